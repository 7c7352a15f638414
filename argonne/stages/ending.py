"""How a training verb ends: an exit code that says whether the run is complete, its page, and what to do next."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path

from argonne.config import LogSection
from argonne.errors import Stopped, first_line
from argonne.files import read_json
from argonne.layout import CHAT_TEMPLATE, FINAL_MODEL, MANIFEST, METRICS, REPORT
from argonne.model.build import config_from_fields
from argonne.plan.shape import weights_on_disk
from argonne.publish.native import has_native_twin
from argonne.report.records import read_metrics
from argonne.train.telemetry import MetricsLog
from argonne.train.trainer import Outcome


def finish_or_stop(outcome: Outcome, run: Path) -> None:
    """Raise Stopped (exit code 3) for a session that ended on request; write the report of a complete run, and say what
    to do next.
    """
    if not outcome.complete:
        raise Stopped(f"stopped at step {outcome.step} ({outcome.reason}); the same command resumes it from {run}")
    others = any(os.environ.get(name, "0") != "0" for name in ("RANK", "NODE_RANK"))  # the first worker alone
    if others or not (run / METRICS).is_file():
        return
    page, name = run / REPORT, shlex.quote(str(run))
    if not page.exists() or page.stat().st_mtime < (run / METRICS).stat().st_mtime:
        _draw(page, outcome.step)
    held_out = "" if read_metrics(run).of("held_out") else " --data 'YOUR/*.txt'"
    config = config_from_fields(weights_on_disk(str(run)) or {})
    kind, out = "native" if has_native_twin(config) else "hf", shlex.quote(f"exports/{run.resolve().name}")
    drawn = f"; its page: {page}" if page.exists() else ""
    print(f"{run} is complete{drawn}. Next:", file=sys.stderr)
    talks = (run / FINAL_MODEL / CHAT_TEMPLATE).is_file()
    before = (read_json(run / MANIFEST).get("parent") or {}).get("model") if talks else None
    beside = f" --before {shlex.quote(before)}" if before else ""
    following = {
        **(
            {f"eval {name} --tasks probes{beside} --page {name}/probes.html": "its answers, before and after"}
            if talks
            else {
                f"generate {name} --prompt 'Once upon a time'": "let it write",
                f"eval {name} --tasks bpb{held_out}": "bits per byte on text it has not seen",
            }
        ),
        f"report {name}": "the page again; name several runs to compare them",
        f"export {name} --as {kind} --out {out}": "for other people's tools",
    }
    for command, meaning in following.items():
        print(f"  argonne {command:{max(map(len, following))}}  # {meaning}", file=sys.stderr, flush=True)


def _draw(page: Path, step: int) -> None:
    """Write the report of a run. The run is complete whatever becomes of it: a failure is a warning."""
    try:
        from argonne.report import report

        report.write_report([page.parent])
    except Exception as error:
        message = f"{page.name} is not written: {type(error).__name__}: {first_line(error)}"
        print(f"warning: {message}", file=sys.stderr, flush=True)
        with suppress(OSError):
            metrics = MetricsLog(page.parent, LogSection(tensorboard=False))
            metrics.write("warning", step, message=message)
            metrics.close()
