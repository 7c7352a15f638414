"""The report's plots: matplotlib to SVG text whose colours are CSS variables, so that one picture serves a light and a
dark page.

Every curve has exactly one vertex a record: path simplification is off, and nothing is resampled.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from argonne.files import human

RUN_COLOURS = 6
# Stand-ins that cannot occur by chance; `_themed` turns them into variables of the page.
_STAND_INS = {
    **{f"#0101{index:02x}": f"--run{index}" for index in range(RUN_COLOURS)},
    "#010220": "--ink",
    "#010221": "--muted",
    "#010222": "--grid",
    "#010223": "--alert",
}
_BY_VARIABLE = {variable: colour for colour, variable in _STAND_INS.items()}
_DASHES = ("-", "--", ":", "-.")
_MARKS = {
    "resume": ("--muted", "--"),
    "stop": ("--muted", ":"),
    "skip": ("--alert", "-"),
    "warning": ("--alert", ":"),
    "change": ("--muted", ":"),
}


@dataclass(frozen=True)
class Curve:
    """One line of a panel. `name` identifies its path in the SVG (attribute id)."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    colour: int
    label: str = ""
    dash: int = 0
    faint: bool = False
    points: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step: kind is resume, stop, skip or warning. `colour` is the run's where several are
    compared.
    """

    step: int
    kind: str
    colour: int | None = None


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    curves: list[Curve]
    marks: list[Mark] = field(default_factory=list)
    logarithmic: bool = False
    from_zero: bool = False

    def legend(self) -> list[Curve]:
        """The curves that need a name: none where there is only one."""
        named = [curve for curve in self.curves if curve.label]
        return named if len(named) > 1 else []


def colour_variable(index: int) -> str:
    return f"--run{index % RUN_COLOURS}"


def draw(panel: Panel, last_step: int) -> str:
    """The panel as an SVG element without a fixed size. All panels of a report share the step axis from 0 to
    `last_step`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "argonne",
        "path.simplify": False,
        "agg.path.chunksize": 0,
        "font.size": 10.5,
        "text.color": _BY_VARIABLE["--ink"],
        "axes.edgecolor": _BY_VARIABLE["--grid"],
        "xtick.color": _BY_VARIABLE["--muted"],
        "ytick.color": _BY_VARIABLE["--muted"],
    }
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        figure = Figure(figsize=(5.6, 2.9))
        axes = figure.add_axes((0.115, 0.13, 0.85, 0.83))
        _axes_style(axes, panel, last_step)
        for curve in panel.curves:  # steps that were never finite leave a gap, not a line across it
            (line,) = axes.plot(
                curve.steps,
                curve.values,
                color=_BY_VARIABLE[colour_variable(curve.colour)],
                linewidth=0.9 if curve.faint else 1.4,
                alpha=0.4 if curve.faint else 1.0,
                linestyle=_DASHES[curve.dash % len(_DASHES)],
                marker="o" if curve.points or len(curve.steps) == 1 else None,
                markersize=3.6,
                solid_joinstyle="round",
                clip_on=not curve.points,
            )
            line.set_gid(curve.name)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        for number, mark in enumerate(panel.marks):
            variable, dash = _MARKS[mark.kind]
            if mark.colour is not None:
                variable = colour_variable(mark.colour)
            line = axes.axvline(
                mark.step, color=_BY_VARIABLE[variable], linestyle=dash, linewidth=1.0, alpha=0.9, zorder=1.5
            )
            line.set_gid(f"mark-{mark.kind}-{mark.step}-{number}")
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _themed(buffer.getvalue(), panel.title)


def _axes_style(axes: Any, panel: Panel, last_step: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, pad=5)
    axes.grid(axis="y", color=_BY_VARIABLE["--grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(0, max(last_step, 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    if panel.logarithmic and any(value > 0 for curve in panel.curves for value in curve.values):
        axes.set_yscale("log", subs=[])
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))


def compact(value: float) -> str:
    """A short axis label: 1.5k, 20M, 3e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 1e3:
        return human(value)
    if abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def _themed(svg: str, title: str) -> str:
    """Only the <svg> element, scaled by the page, its colours variables of the page, its fonts the page's."""
    svg = svg[svg.index("<svg") :]
    for colour, variable in _STAND_INS.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
