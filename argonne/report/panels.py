"""Which curves a report shows, of one run or of several in the same axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from argonne.report.curves import Curve, Mark, Panel
from argonne.report.records import Metrics, Record

Runs = Sequence[tuple[str, Metrics]]  # each with its name
_NOISY = ("loss", "grad_norm", "tokens_per_second", "mfu")  # what is smoothed beside an objective's own metrics
_MARKS = ("resume", "stop", "skip", "warning", "change")


def panels_of(runs: Runs) -> list[Panel]:
    """The panels that hold a curve, in the order of the page."""
    marks = [
        Mark(number, row["step"], kind, event_text(row))
        for number, (_, metrics) in enumerate(runs)
        for kind in _MARKS
        for row in metrics.of(kind)
    ]

    def plain(event: str, name: str) -> list[Curve]:
        return [
            curve
            for number, (run, metrics) in enumerate(runs)
            for curve in _curve(metrics, number, event, (name,), run if len(runs) > 1 else "")
        ]

    def by_source(event: str, name: str) -> list[Curve]:
        sources = dict.fromkeys(source for _, metrics in runs for source in metrics.sources())
        return _told_apart(runs, event, {source: ("sources", source, name) for source in sources})

    stalls = {"for data": ("wait_data_seconds",), "for saves": ("wait_save_seconds",)}
    speeds = {
        "since the record before": ("tokens_per_second",),
        "mean of the session": ("tokens_per_second_mean",),
    }
    shares = {
        "end their turn": ("stopped",),
        "repetition": ("repetition",),
        "question's language": ("same_language",),
        "think, and close it": ("closed",),
    }
    lengths = {"answer": ("length",), "thought": ("trace_length",)}
    panels = [
        _loss_panel(runs, marks),
        Panel("Held-out bits per byte", "", plain("held_out", "bits_per_byte")),
        Panel("Probes", "share of the answers", _told_apart(runs, "probes", shares), from_zero=True),
        Panel("Length of the answers", "tokens", _told_apart(runs, "probes", lengths), from_zero=True),
        Panel("Learning rate", "", plain("step", "lr"), from_zero=True),
        Panel("Gradient norm", "before clipping", plain("step", "grad_norm"), marks, logarithmic=True),
        Panel("Throughput", "tokens/s", _told_apart(runs, "step", speeds), marks, from_zero=True),
        Panel("MFU", "share of the device's peak", plain("step", "mfu"), from_zero=True),
        Panel("Memory", "GB", plain("step", "memory_gb"), from_zero=True),
        Panel("Waiting", "seconds since the session began", _told_apart(runs, "step", stalls), marks, from_zero=True),
        Panel("Tokens per source", "tokens", by_source("step", "tokens"), from_zero=True),
        Panel("Loss per source", "nats per token", by_source("step", "loss")),
        Panel("Held-out loss per source", "nats per token", by_source("held_out", "loss")),
        Panel("Passes per source", "epochs", by_source("step", "passes"), from_zero=True),
    ]
    panels[2:2] = _metric_panels(runs)
    return [panel for panel in panels if panel.curves]


def _metric_panels(runs: Runs) -> list[Panel]:
    """What an objective counts beside its loss: a panel a name, or a name's part before the slash."""
    groups: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in dict.fromkeys(
        name for _, metrics in runs for record in metrics.records for name in record.get("metrics") or {}
    ):
        group, _, part = name.partition("/")
        groups.setdefault(group, {})[part or group] = ("metrics", name)
    panels = []
    for group, fields in groups.items():
        title = group.replace("_", " ")
        panels.append(Panel(title.capitalize(), "", _told_apart(runs, "step", fields)))
        panels.append(Panel(f"Held-out {title}", "", _told_apart(runs, "held_out", fields)))
        panels.append(Panel(title.capitalize(), "task, at each checkpoint", _told_apart(runs, "task", fields)))
    return panels


def _curve(metrics: Metrics, number: int, event: str, names: tuple[str, ...], label: str, **looks: Any) -> list[Curve]:
    """The curve of one field of one run, or none where the field never held a number."""
    steps, values = metrics.series(event, *names)
    if not steps:
        return []
    name, looks = f"curve-{number}-{event}-{'-'.join(names)}", {"colour": number, **looks}
    smooth = event == "step" and (names[0] == "metrics" or names[-1] in _NOISY)
    return [Curve(name, number, steps, values, label=label, smooth=smooth, points=event != "step", **looks)]


def _loss_panel(runs: Runs, marks: list[Mark]) -> Panel:
    curves: list[Curve] = []
    alone = len(runs) == 1
    for number, (name, metrics) in enumerate(runs):
        curves += _curve(metrics, number, "step", ("loss",), "training" if alone else f"{name}: training")
        looks = {"colour": 1} if alone else {"dash": 1}
        curves += _curve(metrics, number, "held_out", ("loss",), "held-out" if alone else f"{name}: held-out", **looks)
    return Panel("Loss", "nats per token", curves, marks)


def _told_apart(runs: Runs, event: str, fields: Mapping[str, tuple[str, ...]]) -> list[Curve]:
    """A curve a run and field, by label. One run: a colour a field. Several: a colour a run, a dash a field."""
    alone = len(runs) == 1
    curves: list[Curve] = []
    for number, (run, metrics) in enumerate(runs):
        for index, (label, names) in enumerate(fields.items()):
            looks = {"colour": index} if alone else {"dash": index}
            curves += _curve(metrics, number, event, names, label if alone else f"{run}: {label}", **looks)
    return curves


def event_text(row: Record) -> str:
    """What a record says beside its event, step and time."""
    told = {key: value for key, value in row.items() if key not in ("event", "step", "time") and value is not None}
    return ", ".join(f"{key} {_short(value)}" for key, value in told.items())


def _short(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
