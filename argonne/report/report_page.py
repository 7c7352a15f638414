"""The report's page: one HTML document with its style and scripts inside. Nothing is loaded from anywhere, and no
script runs but those that the page was written with.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from argonne.report.curves import colour_variable

_CHARTS = ("uPlot-1.6.32.iife.min.js", "charts.js")


def page(title: str, body: Iterable[str], charts: bool = False) -> str:
    """The document; charts: with the scripts that draw the curves in it, run when all else is there."""
    style, scripts, licence = _file("report.css"), [], ""
    if charts:
        style, scripts = _file("uPlot-1.6.32.min.css") + style, [_file(name) for name in _CHARTS]
        licence = f"<!-- uPlot 1.6.32, https://github.com/leeoniya/uPlot\n{_file('uPlot-LICENSE')}-->"
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{found}'" for found in hashes) or "'none'"
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; script-src {allowed}"
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="content-security-policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{style}</style>",
    ]
    begin = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", "<main>"]
    end = ["</main>", licence, *(f"<script>{text}</script>" for text in scripts), "</body>", "</html>", ""]
    return "\n".join([*begin, *body, *end])


def _file(name: str) -> str:
    return (Path(__file__).with_name("page") / name).read_text()


def controls() -> str:
    """What the reader may switch; hidden where no script runs, and a word instead."""
    return _file("controls.html")


def cards(facts: Sequence[tuple[str, str]]) -> str:
    """(label, value) pairs as tiles."""
    tiles = [f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in facts]
    return f'<div class="cards">{"".join(tiles)}</div>'


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), row_colours: Sequence[int] = ()
) -> str:
    """A table; columns listed in `numbers` are right-aligned; `row_colours` puts a run's colour before each row."""

    def cell(text: str, column: int, tag: str, swatch: str = "") -> str:
        kind = ' class="number"' if column in numbers else ""
        tag = tag if text else "td"  # a heading without a text heads nothing
        return f"<{tag}{kind}>{swatch if column == 0 else ''}{escape(text)}</{tag}>"

    def line(row: Sequence[str], tag: str, swatch: str = "") -> str:
        return "<tr>" + "".join(cell(text, column, tag, swatch) for column, text in enumerate(row)) + "</tr>"

    swatches = (f'<i class="swatch" style="color: var({colour_variable(number)})"></i>' for number in row_colours)
    body = "".join(line(row, "td", next(swatches, "")) for row in rows)
    kind = ' class="ranked"' if row_colours else ""
    return f'<div class="scroll"><table{kind}><thead>{line(header, "th")}</thead><tbody>{body}</tbody></table></div>'


def paragraph(text: str, kind: str = "quiet") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def folded(title: str, inside: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{inside}</details>"


def preformatted(text: str, lead: str = "") -> str:
    """Text as written; `lead` (the prompt of a sample) is set apart from what follows it."""
    bold = f"<b>{escape(lead)}</b>" if lead else ""
    return f'<pre class="text">{bold}{escape(text)}</pre>'


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"
