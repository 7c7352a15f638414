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
from argonne.plan.text import hours_at_work
from argonne.recipe import differences
from argonne.report import report_page as page
from argonne.report.records import Metrics, read_metrics, smoothed
from argonne.report.report_plots import Curve, Mark, Panel

_KEY_TO_MARKS = (
    "Horizontal axis: step. Vertical lines: resumed (dashed), stopped (dotted), step skipped (solid), warning (dotted)."
)
_MARKS = ("resume", "stop", "skip", "warning")


@dataclass(frozen=True)
class RunRecord:
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


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page for these run folders and return its path: `out`, or report.html in the first run.

    Raises InputError where a folder is not a run, or its metrics hold no step yet.
    """
    if not runs:
        raise InputError("report: no run given; name at least one run folder")
    names = [Path(run).resolve().name for run in runs]  # the whole path where two runs share one
    records = [
        _read_run(Path(run), name if names.count(name) == 1 else str(run))
        for name, run in zip(names, runs, strict=True)
    ]
    target = out or Path(runs[0]) / layout.REPORT
    title = " and ".join(record.name for record in records) if len(records) < 3 else f"{len(records)} runs"
    body = [page.heading(title, 1)]
    for record in records:
        body += [page.paragraph(f"{record.name}: {problem}", "alert") for problem in record.problems]
    body += (
        _compared_head(records)
        if len(records) > 1
        else [page.paragraph(records[0].state), page.cards(_facts(records[0]))]
    )
    last_step = max(record.metrics.records[-1]["step"] for record in records)
    body += [page.heading("Curves"), page.paragraph(_KEY_TO_MARKS)]
    body += ['<div class="panels">', *(page.figure(panel, last_step) for panel in _panels(records)), "</div>"]
    for record in records:
        body += _details(record, len(records) > 1)
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, page.page(f"{title} - argonne", body))
    return target


def _read_run(folder: Path, name: str) -> RunRecord:
    metrics = read_metrics(folder)
    if not metrics.of("step"):
        raise InputError(f"{metrics.path}: no step logged yet ({metrics.lines} lines); wait for the first log line")
    folder = metrics.path.parent
    problems = list(metrics.problems)
    config, manifest = folder / layout.CONFIG, folder / layout.MANIFEST
    problems += [f"{file.name} is missing" for file in (config, manifest) if not file.is_file()]
    ending = layout.ending_of(folder)  # the run's markers, never its name
    state = f"{ending.lower() if ending else 'not complete, last record'} at step {metrics.records[-1]['step']:,}"
    found = files.read_json(manifest) if manifest.is_file() else {}
    return RunRecord(
        name, folder, metrics, config.read_text() if config.is_file() else "", found, state, tuple(problems)
    )


# ---------------------------------------------------------------------------------------------------------------- facts


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    metrics = record.metrics
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
    facts.append(("time at work", _duration(3600 * (hours_at_work(metrics.records) or 0.0))))
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


def _compared_head(records: list[RunRecord]) -> list[str]:
    facts = [dict(_facts(record)) for record in records]
    rows = [["state", *(record.state for record in records)]]
    rows += [
        [name, *(each.get(name, "") for each in facts)]
        for name in dict.fromkeys(name for each in facts for name in each)
    ]
    parts = [
        page.table(["", *(record.name for record in records)], rows, numbers=range(1, len(records) + 1), swatches=True)
    ]
    trees = [tomllib.loads(record.config_text) for record in records]
    changed: dict[str, list[str]] = {}
    for number, tree in enumerate(trees):
        for key, (first, other) in differences(trees[0], tree).items():
            changed.setdefault(key, [str(first)] * len(records))[number] = str(other)
    if changed:
        parts.append(page.heading("What differs in the configuration"))
        parts.append(
            page.table(
                ["key", *(record.name for record in records)],
                [[key, *values] for key, values in sorted(changed.items())],
            )
        )
    return parts


# --------------------------------------------------------------------------------------------------------------- curves


def _panels(records: list[RunRecord]) -> list[Panel]:
    marks = [
        Mark(row["step"], kind, number if len(records) > 1 else None)
        for number, record in enumerate(records)
        for kind in _MARKS
        for row in record.metrics.of(kind)
    ]

    def plain(event: str, name: str) -> list[Curve]:
        return [
            curve
            for number, record in enumerate(records)
            for curve in _curve(record, number, event, (name,), record.name)
        ]

    def by_source(event: str, name: str) -> list[Curve]:
        sources = dict.fromkeys(source for record in records for source in record.metrics.sources())
        return _told_apart(records, event, {source: ("sources", source, name) for source in sources})

    stalls = {"for data": ("wait_data_seconds",), "for saves": ("wait_save_seconds",)}
    panels = [
        _loss_panel(records, marks),
        Panel("Held-out bits per byte", "", plain("held_out", "bits_per_byte")),
        Panel("Learning rate", "", plain("step", "lr"), from_zero=True),
        Panel("Gradient norm", "before clipping", plain("step", "grad_norm"), marks, logarithmic=True),
        Panel("Throughput", "tokens/s", plain("step", "tokens_per_second"), marks, from_zero=True),
        Panel("MFU", "share of the device's peak", plain("step", "mfu"), from_zero=True),
        Panel("Memory", "GB", plain("step", "memory_gb"), from_zero=True),
        Panel(
            "Waiting", "seconds since the session began", _told_apart(records, "step", stalls), marks, from_zero=True
        ),
        Panel("Tokens per source", "tokens", by_source("step", "tokens"), from_zero=True),
        Panel("Loss per source", "nats per token", by_source("step", "loss")),
        Panel("Held-out loss per source", "nats per token", by_source("held_out", "loss")),
        Panel("Passes per source", "epochs", by_source("step", "passes"), from_zero=True),
    ]
    return [panel for panel in panels if panel.curves]


def _curve(record: RunRecord, number: int, event: str, names: tuple[str, ...], label: str, **looks: Any) -> list[Curve]:
    """The curve of one field of one run, or none where the field never held a number."""
    steps, values = record.metrics.series(event, *names)
    name, looks = f"curve-{number}-{event}-{'-'.join(names)}", {"colour": number, **looks}
    return [Curve(name, steps, values, label=label, points=event == "held_out", **looks)] if steps else []


def _loss_panel(records: list[RunRecord], marks: list[Mark]) -> Panel:
    curves: list[Curve] = []
    alone = len(records) == 1
    for number, record in enumerate(records):
        steps, values = record.metrics.series("step", "loss")
        label = "training, smoothed" if alone else f"{record.name}: training"
        curves.append(
            Curve(f"curve-{number}-step-loss", steps, values, number, label="training" if alone else "", faint=True)
        )
        curves.append(Curve(f"curve-{number}-smoothed-loss", steps, smoothed(values), number, label))
        label, looks = ("held-out", {"colour": 1}) if alone else (f"{record.name}: held-out", {"dash": 1})
        curves += _curve(record, number, "held_out", ("loss",), label, **looks)
    return Panel("Loss", "nats per token", curves, marks)


def _told_apart(records: list[RunRecord], event: str, fields: Mapping[str, tuple[str, ...]]) -> list[Curve]:
    """A curve a run and field, by label. One run: a colour a field. Several: a colour a run, a dash a field."""
    alone = len(records) == 1
    curves: list[Curve] = []
    for number, record in enumerate(records):
        for index, (label, names) in enumerate(fields.items()):
            looks = {"colour": index} if alone else {"dash": index}
            curves += _curve(record, number, event, names, label if alone else f"{record.name}: {label}", **looks)
    return curves


# -------------------------------------------------------------------------------------------------------------- details


def _details(record: RunRecord, named: bool) -> list[str]:
    prefix = f"{record.name}: " if named else ""
    parts: list[str] = []
    samples = record.metrics.of("sample")
    if samples:
        parts.append(page.heading(f"{prefix}Samples over time"))
        for number, row in enumerate(samples):
            prompt, text = str(row.get("prompt", "")), str(row.get("text", ""))
            shown = page.preformatted(text.removeprefix(prompt), lead=prompt)
            parts.append(page.folded(f"step {row['step']:,}", shown, is_open=number in (0, len(samples) - 1)))
    parts.append(page.heading(f"{prefix}Events"))
    events = [row for row in record.metrics.records if row["event"] not in ("step", "sample")]
    rows = [[_clock(row), f"{row['step']:,}", row["event"], _event_text(row)] for row in events]
    parts.append(
        page.folded(
            f"{len(rows)} events", page.table(["UTC", "step", "event", ""], rows, numbers=[1]), is_open=len(rows) <= 12
        )
    )
    if record.manifest:
        facts = _flat(record.manifest)
        parts.append(page.heading(f"{prefix}Manifest"))
        parts.append(page.folded(f"{len(facts)} facts", page.table(["key", "value"], facts), is_open=len(facts) <= 30))
    if record.config_text:
        parts += [page.heading(f"{prefix}Configuration"), page.folded(layout.CONFIG, page.code(record.config_text))]
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
