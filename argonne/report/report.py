"""`argonne report`: one or several runs -> one self-contained HTML page with curves."""

from __future__ import annotations

import math
import statistics
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
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
from argonne.report.curves import embedded, figure
from argonne.report.panels import event_text, panels_of
from argonne.report.records import Metrics, read_metrics, smoothed
from argonne.report.runs import is_running

_KEY_TO_MARKS = (
    "Vertical lines: resumed (dashed), stopped (dotted), step skipped (solid), warning or key changed (dotted). Hover "
    "for values, drag to zoom, double-click for the whole range."
)
_SIZES = {"num_hidden_layers": "layers", "hidden_size": "wide", "vocab_size": "tokens in the vocabulary"}
_LOOK_AGAIN = 20.0  # seconds between two looks at the records of a run that lives


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
    running: bool
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
    live = any(run.running for run in runs)
    body = [page.heading(title, 1)]
    for run in runs:
        body += [page.paragraph(f"{run.name}: {problem}", "alert") for problem in run.problems]
    body += _compared_head(runs) if len(runs) > 1 else _head(runs[0])
    if live:
        again = f"argonne report {' '.join(map(str, folders))}{f' --out {out}' if out else ''} --watch"
        body.append(
            page.paragraph(f"Written at {datetime.now(UTC):%H:%M:%S} UTC. `{again}` keeps the page up to date.")
        )
    panels = panels_of([(run.name, run.metrics) for run in runs])
    body += [page.heading("Curves"), page.controls(), page.paragraph(_KEY_TO_MARKS)]
    body += ['<div class="panels">', *(figure(panel, number) for number, panel in enumerate(panels)), "</div>"]
    for run in runs:
        body += _details(run, len(runs) > 1)
    body.append(embedded([(run.name, run.metrics) for run in runs], panels, live))
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, page.page(f"{title} - argonne", body, charts=True))
    return target


def watch_report(
    folders: Sequence[Path], out: Path | None = None, *, wait: Callable[[float], object] = time.sleep
) -> Path:
    """Write the page, and again whenever a run's records grew, until none of the runs lives."""
    while True:
        live = any(map(_lives, folders))  # before it is read: what a run wrote last is in the page
        seen = _sizes(folders)
        target = write_report(folders, out)
        if not live:
            return target
        wait(_LOOK_AGAIN)  # in any case: the page of a long run takes seconds of a core that trains
        while _sizes(folders) == seen and any(map(_lives, folders)):
            wait(_LOOK_AGAIN)


def _lives(folder: Path) -> bool:
    """Is the run being trained? One that wrote its marker has ended, though its process still draws this page."""
    return layout.ending_of(folder) is None and is_running(folder)


def _sizes(folders: Sequence[Path]) -> list[int]:
    return [layout.metrics_of(folder).stat().st_size for folder in folders]


def _read_run(folder: Path, name: str) -> ReportedRun:
    metrics = read_metrics(folder)
    if not metrics.of("step"):
        raise InputError(f"{metrics.path}: no step logged yet ({metrics.lines} lines); wait for the first log line")
    folder = metrics.path.parent
    problems = list(metrics.problems)
    config, manifest = folder / layout.CONFIG, folder / layout.MANIFEST
    problems += [f"{file.name} is missing" for file in (config, manifest) if not file.is_file()]
    ending = layout.ending_of(folder)  # the run's markers, never its name
    found = files.read_json(manifest) if manifest.is_file() else {}
    running = _lives(folder)
    state = "running" if running else ending.lower() if ending else "not complete, last run"
    state += f" at step {metrics.records[-1]['step']:,}"
    state += f" of {found['total_steps']:,}" if running and found.get("total_steps") else ""
    text = config.read_text() if config.is_file() else ""
    return ReportedRun(name, folder, metrics, text, found, state, running, tuple(problems))


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


def _model(run: ReportedRun, sizes: Iterable[str] = _SIZES) -> str:
    """The model in a line: its preset, its parameters and these of its sizes, as far as the run says."""
    model = tomllib.loads(run.config_text).get("model", {})
    parameters = run.manifest.get("parameters")
    parts = [str(model.get("preset") or ""), f"{files.human(parameters)} parameters" if parameters else ""]
    parts += [f"{model[key]:,} {_SIZES[key]}" for key in sizes if key in model]
    return ", ".join(part for part in parts if part)


def _head(run: ReportedRun) -> list[str]:
    parts = [page.paragraph(model, "model")] if (model := _model(run)) else []
    return [*parts, page.paragraph(run.state), page.cards(_facts(run))]


def _rank(run: ReportedRun) -> float:
    """The last held-out loss; what has none comes last."""
    value = (run.metrics.last("held_out") or {}).get("loss")
    return value if isinstance(value, int | float) and math.isfinite(value) else math.inf


def _compared_head(runs: list[ReportedRun]) -> list[str]:
    facts = [dict(_facts(run)) for run in runs]
    ranked = sorted(range(len(runs)), key=lambda number: _rank(runs[number]))
    shown = ["held-out loss, last", "held-out bits per byte", "training loss, smoothed", "tokens", "time at work"]
    shown = [name for name in shown if any(name in each for each in facts)]
    rows = []
    for number in ranked:
        values = [facts[number].get(name, "n/a") for name in shown]
        rows.append([runs[number].name, *values, _model(runs[number], ["num_hidden_layers"]), runs[number].state])
    parts = [page.paragraph("Ranked by held-out loss, lowest first."), _not_alike(runs)]
    parts.append(
        page.table(["run", *shown, "model", "state"], rows, numbers=range(1, len(shown) + 1), row_colours=ranked)
    )
    others = [name for name in dict.fromkeys(name for each in facts for name in each) if name not in shown]
    rows = [[name, *(each.get(name, "") for each in facts)] for name in others]
    more = page.table(["", *(run.name for run in runs)], rows, numbers=range(1, len(runs) + 1))
    parts.append(page.folded("Steps, speed, memory, waiting", more))
    trees = [tomllib.loads(run.config_text) for run in runs]
    changed: dict[str, list[str]] = {}
    for number, tree in enumerate(trees):
        for key, (first, other) in differences(trees[0], tree).items():
            changed.setdefault(key, [str(first)] * len(runs))[number] = str(other)
    if changed:
        rows = [[key, *values] for key, values in sorted(changed.items())]
        title = f"What differs in the configuration ({len(rows)})"
        table = page.table(["key", *(run.name for run in runs)], rows)
        parts.append(page.folded(title, table, is_open=len(rows) <= 8))
    return parts


def _not_alike(runs: list[ReportedRun]) -> str:
    """A warning where losses are of different tokens: a loss a token says nothing across tokenizers."""
    made = {run.manifest.get("tokenizer_fingerprint") for run in runs}
    if len(made) < 2:
        return ""
    return page.paragraph("The runs have different tokenizers: compare bits per byte, not losses.", "alert")


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
    rows = [[_clock(row), f"{row['step']:,}", row["event"], event_text(row)] for row in events]
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


def _flat(value: Any, where: str = "") -> list[tuple[str, str]]:
    """Nested dicts as dotted keys; lists of plain values on one line."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{where}.{key}" if where else str(key))]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [pair for index, item in enumerate(value) for pair in _flat(item, f"{where}[{index}]")]
    return [(where, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]
