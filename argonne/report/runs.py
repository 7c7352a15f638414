"""What the runs below a folder are doing: running, stopped, failed, complete."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.errors import InputError
from argonne.layout import Kind
from argonne.report.records import read_metrics
from argonne.train.run import RunFolder, lock_is_stale


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """One row a run, newest activity first. Raises InputError where there is no such folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the one that holds the runs")
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    runs = [RunFolder(path) for path in candidates if layout.kind_of(path) is Kind.RUN]
    rows = [_row(run) for run in runs if run.exists()]
    return sorted(rows, key=lambda row: -row["last_activity"])


def is_running(run: Path) -> bool:
    """Does a process live that trains this run?"""
    lock = run / layout.LOCK
    return lock.exists() and not lock_is_stale(lock)


def _row(run: RunFolder) -> dict[str, Any]:
    path, manifest, lock = run.path, run.manifest(), run.path / layout.LOCK
    if is_running(path):
        status = "running"
    elif run.marker(layout.COMPLETE):
        status = "complete"
    else:
        status = f"stopped ({stopped['reason']})" if (stopped := run.marker(layout.STOPPED)) else "failed"
    metrics = read_metrics(path) if (path / layout.METRICS).is_file() else None
    last = (metrics.last("step") if metrics else None) or {}
    activity = max(
        file.stat().st_mtime for file in (path / layout.MANIFEST, path / layout.METRICS, lock) if file.exists()
    )
    return {
        "name": path.name,
        "path": str(path),
        "status": status,
        "step": last.get("step", 0),
        "total_steps": manifest.get("total_steps"),
        "loss": last.get("loss"),
        "tokens": last.get("tokens", 0),
        "sessions": manifest.get("sessions"),
        "last_activity": activity,
    }


def runs_table(rows: list[dict[str, Any]]) -> str:
    """The rows for a person."""
    if not rows:
        return "no runs there"
    lines = [f"{'run':<28} {'status':<24} {'step':>16} {'loss':>8} {'tokens':>12}  last activity"]
    for row in rows:
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["last_activity"]))
        steps = f"{row['step']:,}/{row['total_steps'] or 0:,}"
        lines.append(f"{row['name']:<28} {row['status']:<24} {steps:>16} {loss:>8} {row['tokens']:>12,}  {when}")
    return "\n".join(lines)
