"""The page of a whole way: what each stage changed, in numbers and in the answers to the same questions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from argonne import files
from argonne.report import probes_page
from argonne.report import report_page as page

# (task, number, of sampled answers) -> (its name, whether it is a share).
MEASURES = {
    ("sums", "exact_match", False): ("problems solved", True),
    ("sums", "closed", False): ("think, and close it", True),
    ("sums", "consistent", False): ("the last result is the answer", True),
    ("sums", "sentences", True): ("answer in a sentence, sampled", True),
    ("turns", "exact_match", False): ("turns answered", True),
    ("bpb", "bits_per_byte", False): ("bits per byte of documentation (lower is better)", False),
}


def write_way_page(
    out: Path, found: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], reports: Mapping[str, Path]
) -> None:
    """found: stage -> the results of `evaluate` by task, in the order of the way; titles and reports: those of the
    stages that trained.
    """
    body = [page.heading("What each stage changed", 1), _measures(found), page.heading("The stages")]
    for name, title in titles.items():
        link = escape(os.path.relpath(reports[name], out.parent))
        body.append(f'<p><a href="{link}">{escape(name)}</a>: {escape(title)}</p>')
    body += [page.heading("The same questions after each stage")]
    body.append(probes_page.answers({name: tasks["probes"]["greedy"] for name, tasks in found.items()}))
    files.write_text(out, page.page("What each stage changed - argonne", body))


def _measures(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a measure, a column a stage, a bar under each number: of a share of 1, of others of the largest."""
    head = "<td></td>" + "".join(f"<th>{escape(name)}</th>" for name in found)
    body = ""
    for (task, key, sampled), (name, share) in MEASURES.items():
        values = [(tasks[task]["sampled"] if sampled else tasks[task])[key] for tasks in found.values()]
        largest = 1.0 if share else max(values)
        cells = "".join(
            f'<td class="number">{value:.1%}{_bar(value)}</td>'
            if share
            else f'<td class="number">{value:.3f}{_bar(value / largest)}</td>'
            for value in values
        )
        body += f"<tr><td>{escape(name)}</td>{cells}</tr>"
    return f'<div class="scroll"><table class="way"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _bar(part: float) -> str:
    return f'<span class="track"><i style="width: {100 * part:.1f}%"></i></span>'
