"""The items on which two models differ, side by side, as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from argonne import files
from argonne.report import report_page as page


def write_compare_page(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """rows: of argonne.evaluate.compare."""
    body = [page.heading("Comparison", 1), _differences(rows)]
    for row in rows:
        if row["differing"]:
            body += [page.heading(f"{row['task']}: {len(row['differing']):,} items differ"), _items(row)]
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, page.page("Comparison - argonne", body))


def _differences(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["task", "first", "second", "", "", "difference", "95 %", "p", "p, corrected", "smallest that shows"]
    cells = [
        [
            row["task"],
            Path(row["first"]).name,
            Path(row["second"]).name,
            *(f"{value:.4f}" for value in row["values"]),
            f"{row['value']:+.4f}",
            f"{row['low']:+.4f} to {row['high']:+.4f}",
            f"{row['p']:.3g}",
            f"{row['p_corrected']:.3g}",
            f"{row['visible']:.4f}" if "visible" in row else "",
        ]
        for row in rows
    ]
    return page.table(head, cells, numbers=range(3, len(head)))


def _items(row: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ["question", *(Path(row[one]).name for one in SIDES)])
    body = "".join(
        f'<tr><td class="question">{page.preformatted(item["asked"])}</td>'
        + "".join(f"<td>{_cell(item[one])}</td>" for one in SIDES)
        + "</tr>"
        for item in row["differing"]
    )
    return (
        f'<div class="scroll"><table class="answers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


SIDES = ("first", "second")


def _cell(item: Mapping[str, Any]) -> str:
    return f'{page.preformatted(item["answer"])}<p class="quiet">{"right" if item["right"] else "wrong"}</p>'
