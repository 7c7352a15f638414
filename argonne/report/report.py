"""`argonne report`: one or several runs -> one self-contained HTML page with plots."""

from __future__ import annotations

import math
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from argonne import files, layout
from argonne.errors import InputError
from argonne.recipe import differences
from argonne.report import probes_page
from argonne.report import report_page as page
from argonne.report.records import Metrics, read_metrics, smoothed
from argonne.report.report_plots import Curve, Mark, Panel

_KEY_TO_MARKS = (
    "Horizontal axis: step. Vertical lines: resumed (dashed), stopped (dotted), step skipped (solid), warning or key "
    "changed (dotted)."
)
_MARKS = ("resume", "stop", "skip", "warning", "change")


@dataclass(frozen=True)
class ReportedRun:
    """Everything the page says about one run. `config` and `manifest` are empty where the run has no such file, and
    `problems` says so.
    """

    name: str
    folder: Path
    metrics: Metrics
    config_text: str
    manifest: dict[str, Any]
    state: str
    problems: tuple[str, ...]


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page for these run folders and return its path: `out`, or report.html in the first run.

    Raises InputError where a folder is not a run, or its metrics hold no step yet.
    """
    if not folders:
        raise InputError("report: no run given; name at least one run folder")
    names = [Path(folder).resolve().name for folder in folders]  # the whole path where two runs share one
    runs = [
        _read_run(Path(folder), name if names.count(name) == 1 else str(folder))
        for name, folder in zip(names, folders, strict=True)
    ]
    target = out or Path(folders[0]) / layout.REPORT
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    body = [page.heading(title, 1)]
    for run in runs:
        body += [page.paragraph(f"{run.name}: {problem}", "alert") for problem in run.problems]
    body += _compared_head(runs) if len(runs) > 1 else [page.paragraph(runs[0].state), page.cards(_facts(runs[0]))]
    last_step = max(run.metrics.records[-1]["step"] for run in runs)
    body += [page.heading("Curves"), page.paragraph(_KEY_TO_MARKS)]
    body += ['<div class="panels">', *(page.figure(panel, last_step) for panel in _panels(runs)), "</div>"]
    for run in runs:
        body += _details(run, len(runs) > 1)
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, page.page(f"{title} - argonne", body))
    return target


def _read_run(folder: Path, name: str) -> ReportedRun:
    metrics = read_metrics(folder)
    if not metrics.of("step"):
        raise InputError(f"{metrics.path}: no step logged yet ({metrics.lines} lines); wait for the first log line")
    folder = metrics.path.parent
    problems = list(metrics.problems)
    config, manifest = folder / layout.CONFIG, folder / layout.MANIFEST
    problems += [f"{file.name} is missing" for file in (config, manifest) if not file.is_file()]
    ending = layout.ending_of(folder)  # the run's markers, never its name
    state = f"{ending.lower() if ending else 'not complete, last run'} at step {metrics.records[-1]['step']:,}"
    found = files.read_json(manifest) if manifest.is_file() else {}
    return ReportedRun(
        name, folder, metrics, config.read_text() if config.is_file() else "", found, state, tuple(problems)
    )


# ---------------------------------------------------------------------------------------------------------------- facts


def _facts(run: ReportedRun) -> list[tuple[str, str]]:
    metrics = run.metrics
    steps, held_out = metrics.of("step"), metrics.of("held_out")
    losses = metrics.series("step", "loss")[1]
    facts = [("steps", f"{steps[-1]['step']:,}"), ("tokens", f"{steps[-1].get('tokens') or 0:,}")]
    facts.append(("training loss, smoothed", f"{smoothed(losses)[-1]:.4f}" if losses else "n/a"))
    if held_out:
        facts.append(("held-out loss, last", _number(held_out[-1].get("loss"), ".4f")))
        if any(row.get("bits_per_byte") is not None for row in held_out):
            facts.append(("held-out bits per byte", _number(held_out[-1].get("bits_per_byte"), ".4f")))
    speed = metrics.series("step", "tokens_per_second")[1]
    facts.append(("tokens/s, median", f"{statistics.median(speed):,.0f}" if speed else "n/a"))
    if use := metrics.series("step", "mfu")[1]:
        facts.append(("MFU, median", f"{statistics.median(use):.1%}"))
    memory = metrics.series("step", "memory_gb")[1]
    facts.append(("peak memory, GB", f"{max(memory):.2f}" if memory else "n/a"))
    facts.append(("time at work", _duration(3600 * (metrics.hours or 0.0))))
    waits = [metrics.series("step", name)[1] for name in ("wait_data_seconds", "wait_save_seconds")]
    # Each counts from zero again in every session.
    summed = [sum(late - early if late >= early else late for early, late in pairwise([0.0, *wait])) for wait in waits]
    facts.append(("waiting: data, saves", ", ".join(map(_duration, summed))))
    facts.append(("resumed, skipped", f"{len(metrics.of('resume'))}, {len(metrics.of('skip'))}"))
    return facts


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "n/a"


def _compared_head(runs: list[ReportedRun]) -> list[str]:
    facts = [dict(_facts(run)) for run in runs]
    rows = [["state", *(run.state for run in runs)]]
    rows += [
        [name, *(each.get(name, "") for each in facts)]
        for name in dict.fromkeys(name for each in facts for name in each)
    ]
    parts = [page.table(["", *(run.name for run in runs)], rows, numbers=range(1, len(runs) + 1), swatches=True)]
    trees = [tomllib.loads(run.config_text) for run in runs]
    changed: dict[str, list[str]] = {}
    for number, tree in enumerate(trees):
        for key, (first, other) in differences(trees[0], tree).items():
            changed.setdefault(key, [str(first)] * len(runs))[number] = str(other)
    if changed:
        parts.append(page.heading("What differs in the configuration"))
        parts.append(
            page.table(
                ["key", *(run.name for run in runs)],
                [[key, *values] for key, values in sorted(changed.items())],
            )
        )
    return parts


# --------------------------------------------------------------------------------------------------------------- curves


def _panels(runs: list[ReportedRun]) -> list[Panel]:
    marks = [
        Mark(row["step"], kind, number if len(runs) > 1 else None)
        for number, run in enumerate(runs)
        for kind in _MARKS
        for row in run.metrics.of(kind)
    ]

    def plain(event: str, name: str) -> list[Curve]:
        return [curve for number, run in enumerate(runs) for curve in _curve(run, number, event, (name,), run.name)]

    def by_source(event: str, name: str) -> list[Curve]:
        sources = dict.fromkeys(source for run in runs for source in run.metrics.sources())
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


def _metric_panels(runs: list[ReportedRun]) -> list[Panel]:
    """What an objective counts beside its loss: a panel a name, or a name's part before the slash."""
    groups: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in dict.fromkeys(
        name for run in runs for record in run.metrics.records for name in record.get("metrics") or {}
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


def _curve(run: ReportedRun, number: int, event: str, names: tuple[str, ...], label: str, **looks: Any) -> list[Curve]:
    """The curve of one field of one run, or none where the field never held a number."""
    steps, values = run.metrics.series(event, *names)
    name, looks = f"curve-{number}-{event}-{'-'.join(names)}", {"colour": number, **looks}
    return (
        [Curve(name, steps, values, label=label, points=event in ("held_out", "probes", "task"), **looks)]
        if steps
        else []
    )


def _loss_panel(runs: list[ReportedRun], marks: list[Mark]) -> Panel:
    curves: list[Curve] = []
    alone = len(runs) == 1
    for number, run in enumerate(runs):
        steps, values = run.metrics.series("step", "loss")
        label = "training, smoothed" if alone else f"{run.name}: training"
        curves.append(
            Curve(f"curve-{number}-step-loss", steps, values, number, label="training" if alone else "", faint=True)
        )
        curves.append(Curve(f"curve-{number}-smoothed-loss", steps, smoothed(values), number, label))
        label, looks = ("held-out", {"colour": 1}) if alone else (f"{run.name}: held-out", {"dash": 1})
        curves += _curve(run, number, "held_out", ("loss",), label, **looks)
    return Panel("Loss", "nats per token", curves, marks)


def _told_apart(runs: list[ReportedRun], event: str, fields: Mapping[str, tuple[str, ...]]) -> list[Curve]:
    """A curve a run and field, by label. One run: a colour a field. Several: a colour a run, a dash a field."""
    alone = len(runs) == 1
    curves: list[Curve] = []
    for number, run in enumerate(runs):
        for index, (label, names) in enumerate(fields.items()):
            looks = {"colour": index} if alone else {"dash": index}
            curves += _curve(run, number, event, names, label if alone else f"{run.name}: {label}", **looks)
    return curves


# -------------------------------------------------------------------------------------------------------------- details


def _details(run: ReportedRun, named: bool) -> list[str]:
    prefix = f"{run.name}: " if named else ""
    parts: list[str] = []
    samples = run.metrics.of("sample")
    if samples:
        parts.append(page.heading(f"{prefix}Samples over time"))
        for number, row in enumerate(samples):
            prompt, text = str(row.get("prompt", "")), str(row.get("text", ""))
            shown = page.preformatted(text.removeprefix(prompt), lead=prompt)
            parts.append(page.folded(f"step {row['step']:,}", shown, is_open=number in (0, len(samples) - 1)))
    if columns := probes_page.of_run(run.metrics.of("probes")):
        parts += [page.heading(f"{prefix}Answers to the probes"), probes_page.measures(columns)]
        parts.append(probes_page.answers(columns))
    parts.append(page.heading(f"{prefix}Events"))
    events = [row for row in run.metrics.records if row["event"] not in ("step", "sample", "probes", "task")]
    rows = [[_clock(row), f"{row['step']:,}", row["event"], _event_text(row)] for row in events]
    parts.append(
        page.folded(
            f"{len(rows)} events", page.table(["UTC", "step", "event", ""], rows, numbers=[1]), is_open=len(rows) <= 12
        )
    )
    if run.manifest:
        facts = _flat(run.manifest)
        parts.append(page.heading(f"{prefix}Manifest"))
        parts.append(page.folded(f"{len(facts)} facts", page.table(["key", "value"], facts), is_open=len(facts) <= 30))
    if run.config_text:
        parts += [page.heading(f"{prefix}Configuration"), page.folded(layout.CONFIG, page.code(run.config_text))]
    return parts


def _clock(row: dict[str, Any]) -> str:
    moment = row.get("time")
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S") if isinstance(moment, int | float) else ""


def _event_text(row: dict[str, Any]) -> str:
    told = {key: value for key, value in row.items() if key not in ("event", "step", "time") and value is not None}
    return ", ".join(f"{key} {_short(value)}" for key, value in told.items())


def _short(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _flat(value: Any, where: str = "") -> list[tuple[str, str]]:
    """Nested dicts as dotted keys; lists of plain values on one line."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{where}.{key}" if where else str(key))]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [pair for index, item in enumerate(value) for pair in _flat(item, f"{where}[{index}]")]
    return [(where, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]
