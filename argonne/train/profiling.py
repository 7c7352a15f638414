"""A trace of a few steps, for a timeline viewer (Perfetto, chrome://tracing)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARMUP, ACTIVE = 3, 1, 3


def start_profiler(run: Path, log: Callable[[str], None]) -> profile:
    """A started profiler: call `step()` after each training step. It skips the first steps, then writes
    `profile/trace.json` and a table.
    """

    def write(found: profile) -> None:
        folder = run / "profile"
        folder.mkdir(exist_ok=True)
        found.export_chrome_trace(str(folder / "trace.json"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (folder / "operators.txt").write_text(found.key_averages().table(sort_by=order, row_limit=40))
        log(f"profile of {ACTIVE} steps: {folder / 'trace.json'} (open in Perfetto), {folder / 'operators.txt'}")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    started = profile(
        activities=activities,
        schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
        on_trace_ready=write,
    )
    started.start()
    return started
