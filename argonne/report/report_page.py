"""The report's page: one HTML document with its style inside. No script, no font and no picture is loaded from
anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from argonne.report.report_plots import Panel, colour_variable, draw

STYLE = Path(__file__).with_name("report.css")


def page(title: str, body: Iterable[str]) -> str:
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{STYLE.read_text()}</style>",
    ]
    return "\n".join(
        ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body, "</body>", "</html>", ""]
    )


def cards(facts: Sequence[tuple[str, str]]) -> str:
    """(label, value) pairs as tiles."""
    tiles = [f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in facts]
    return f'<div class="cards">{"".join(tiles)}</div>'


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), swatches: bool = False
) -> str:
    """A table; columns listed in `numbers` are right-aligned; `swatches` puts the runs' colours before the heads from
    the second on.
    """

    def cell(text: str, column: int, tag: str) -> str:
        kind = ' class="number"' if column in numbers else ""
        swatch = _swatch(column - 1) if swatches and tag == "th" and column else ""
        return f"<{tag}{kind}>{swatch}{escape(text)}</{tag}>"

    def line(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(cell(text, column, tag) for column, text in enumerate(row)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(header, "th")}</thead><tbody>{body}</tbody></table></div>'


def _swatch(colour: int, kind: str = "") -> str:
    return f'<i class="swatch {kind}" style="color: var({colour_variable(colour)})"></i>'


def paragraph(text: str, kind: str = "quiet") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def figure(panel: Panel, last_step: int) -> str:
    keys = ""
    for curve in panel.legend():
        looks = f"dash{curve.dash % 4} faint" if curve.faint else f"dash{curve.dash % 4}"
        keys += f'<span class="key">{_swatch(curve.colour, looks)}{escape(curve.label)}</span>'
    unit = f"<span>{escape(panel.unit)}</span>" if panel.unit else ""
    return (
        f"<figure><figcaption><h3>{escape(panel.title)}</h3>{unit}{keys}</figcaption>{draw(panel, last_step)}</figure>"
    )


def folded(title: str, inside: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{inside}</details>"


def preformatted(text: str, lead: str = "") -> str:
    """Text as written; `lead` (the prompt of a sample) is set apart from what follows it."""
    bold = f"<b>{escape(lead)}</b>" if lead else ""
    return f'<pre class="text">{bold}{escape(text)}</pre>'


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"
