"""The report's curves: what a chart shows, and the data that the page draws it from.

Every curve has one point a record; nothing is resampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from argonne.files import human, json_text
from argonne.report.records import Metrics

RUN_COLOURS = 6


@dataclass(frozen=True)
class Curve:
    """One line of a panel. `run`: whose. `smooth`: drawn faint beside its moving mean. `points`: few enough to see."""

    name: str
    run: int
    steps: Sequence[int]
    values: Sequence[float]
    colour: int
    label: str = ""
    dash: int = 0
    smooth: bool = False
    points: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step of a run: kind is resume, stop, skip, warning or change."""

    run: int
    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    curves: list[Curve]
    marks: list[Mark] = field(default_factory=list)
    logarithmic: bool = False
    from_zero: bool = False

    def told(self) -> str:
        """The panel in words, for a reader who sees no picture."""
        parts = []
        for curve in self.curves:
            finite = [value for value in curve.values if math.isfinite(value)]
            if finite:
                parts.append(
                    f"{curve.label or 'its curve'}: {len(curve.values):,} points to step {curve.steps[-1]:,}, "
                    f"first {compact(finite[0])}, lowest {compact(min(finite))}, last {compact(finite[-1])}"
                )
        return f"{self.title}. {'; '.join(parts)}"


def colour_variable(index: int) -> str:
    return f"--run{index % RUN_COLOURS}"


def compact(value: float) -> str:
    """A short number: 1.5k, 20M, 3e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 1e3:
        return human(value)
    if abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def embedded(runs: Sequence[tuple[str, Metrics]], panels: Sequence[Panel], live: bool) -> str:
    """All of it as JSON in a script element that is never run: no text in it can end the element.

    Steps are written once where curves share them, and named by their place in `steps`. A run's tokens and hours are
    known at some steps; the page places all others between them. Not finite: null.
    """
    steps: dict[tuple[int, ...], int] = {}

    def place(found: Sequence[int]) -> int:
        return steps.setdefault(tuple(found), len(steps))

    def axis(found: tuple[Sequence[int], Sequence[float]], *, zero: bool) -> dict[str, Any]:
        at, values = found
        before = [0] if zero and at and at[0] > 0 else []
        return {"steps": place([*before, *at]), "values": [*before, *values]}

    told = {
        "runs": [
            {
                "name": name,
                "tokens": axis(metrics.series("step", "tokens"), zero=True),
                "hours": axis((tuple(metrics.worked), tuple(metrics.worked.values())), zero=False),
            }
            for name, metrics in runs
        ],
        "panels": [
            {
                "title": panel.title,
                "logarithmic": panel.logarithmic,
                "zero": panel.from_zero,
                "curves": [{**vars(curve), "steps": place(curve.steps)} for curve in panel.curves],
                "marks": [vars(mark) for mark in panel.marks],
            }
            for panel in panels
        ],
        "live": live,
    }
    text = json_text({**told, "steps": [list(found) for found in steps]}, ascii_only=True)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return f'<script type="application/json" id="data">{text}</script>'


def figure(panel: Panel, number: int) -> str:
    """A panel's frame: title, unit, each curve's name with its last value; the page draws into it."""
    keys = ""
    for curve in panel.curves:
        last = next((value for value in reversed(curve.values) if math.isfinite(value)), None)
        label = f"{escape(curve.label)} " if curve.label else ""
        swatch = f'<i class="swatch dash{curve.dash % 4}" style="color: var({colour_variable(curve.colour)})"></i>'
        keys += f"<li>{swatch}{label}<b>{'n/a' if last is None else compact(last)}</b></li>"
    unit = f"<span>{escape(panel.unit)}</span>" if panel.unit else ""
    title = escape(panel.title)
    checked = " checked" if panel.logarithmic else ""
    switch = f'<label class="log" hidden><input type="checkbox"{checked} aria-label="{title}: logarithmic">log</label>'
    return (
        f'<figure data-panel="{number}"><figcaption><h3>{title}</h3>{unit}{switch}<ul class="keys">{keys}</ul>'
        f'</figcaption><div class="plot" role="img" aria-label="{escape(panel.told())}"></div></figure>'
    )
