"""Answers to the same questions side by side: of a run's checkpoints, of two models, greedy and sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from argonne import files
from argonne.report import report_page as page

# Measure of a summary -> (its name, its format).
MEASURES = {
    "answers": ("answers", ",.0f"),
    "stopped": ("end their turn", ".0%"),
    "length": ("tokens an answer", ",.0f"),
    "repetition": ("runs of four tokens repeated", ".0%"),
    "same_language": ("in the question's language", ".0%"),
    "languages_told": ("answers that tell a language", ",.0f"),
    "closed": ("think, and close it", ".0%"),
    "trace_length": ("tokens of thought", ",.0f"),
}
COLUMNS = 3  # of a run's checkpoints


def measures(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the measures; columns: name -> summary."""
    rows = []
    for key, (name, form) in MEASURES.items():
        values = [column.get(key) for column in columns.values()]
        if any(value is not None for value in values):
            rows.append([name, *("n/a" if value is None else format(value, form) for value in values)])
    return page.table(["", *columns], rows, numbers=range(1, len(columns) + 1))


def answers(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A table with a row a question and a column a model; columns: name -> summary with its probes."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ["question", *columns])
    asked: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, column in columns.items():
        for probe in column.get("probes", ()):
            asked.setdefault(str(probe["question"]), {})[name] = probe
    body = ""
    for question, given in asked.items():
        cells = "".join(_cell(given.get(name)) for name in columns)
        body += f'<tr><td class="question">{escape(question)}</td>{cells}</tr>'
    return (
        f'<div class="scroll"><table class="answers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(probe: Mapping[str, Any] | None) -> str:
    if probe is None:
        return "<td></td>"
    told = [f"{probe['tokens']:,} tokens", f"ended by {probe['stop']}"]
    if probe["repetition"]:
        told.append(f"{probe['repetition']:.0%} repeated")
    if probe["trace"]:
        told.append(f"thought {probe['trace']}")
    small = f'<p class="quiet">{escape(", ".join(told))}</p>'
    return f"<td>{page.preformatted(probe['answer'])}{small}</td>"


def of_run(records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Columns of a run's probes: the first, the one in the middle and the last."""
    places = sorted({0, len(records) // 2, len(records) - 1}) if records else []
    return {f"step {records[place]['step']:,}": records[place] for place in places[:COLUMNS]}


def write_probes_page(out: Path, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """One page with the measures and the answers of `argonne eval --tasks probes`."""
    body = [page.heading("Probes", 1), page.paragraph("The same questions to each; what differs is the model.")]
    body += [measures(columns), page.heading("Answers"), answers(columns)]
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, page.page("Probes - argonne", body))
