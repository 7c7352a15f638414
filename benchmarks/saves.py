"""Seconds the loop waits for a save of a 1 GB state, in place and in the background, beside what the
disk itself takes.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark, Column, main

GIGABYTE = 10**9


def _model() -> tuple[Any, Any]:
    """A plain module whose weights and moments make up 1 GB, and its optimizer."""
    import torch
    from torch import nn

    from argonne.config import OptimSection
    from argonne.train.optim import build_optimizer

    width = 4096
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(round(GIGABYTE / 12 / width**2))])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, build_optimizer(model, OptimSection())


def _save(asynchronous: bool) -> dict[str, float]:
    import torch

    from argonne.config import CheckpointSection, LogSection
    from argonne.parallel.mesh import Mesh
    from argonne.train.saving import Saver
    from argonne.train.telemetry import MetricsLog

    model, optimizer = _model()
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DISK")) as name:
        folder = Path(name)
        keep = CheckpointSection(asynchronous=asynchronous, keep_last=9)
        metrics = MetricsLog(folder, LogSection(tensorboard=False), enabled=False)
        mesh = Mesh(torch.device("cpu"))
        saver = Saver(folder, model, optimizer, mesh, keep, metrics, lambda text: None, lambda path: None, 0)
        saver.save(1, {}, None)  # a save of a run that is on its way: not its first
        saver.wait()
        start = time.perf_counter()
        saver.save(2, {}, None)
        blocked = time.perf_counter() - start
        saver.wait()
        durable = time.perf_counter() - start
        size = sum(path.stat().st_size for path in (folder / "checkpoint_step_2").iterdir())
    return {"blocked": blocked, "durable": durable, "gigabytes": size / GIGABYTE}


def disk(_point: str) -> dict[str, float]:
    """Write and fsync the same number of bytes: what no format can beat."""
    data = os.urandom(1 << 24)
    with tempfile.NamedTemporaryFile(dir=os.environ.get("BENCHMARK_DISK")) as file:
        start = time.perf_counter()
        for _ in range(GIGABYTE // len(data)):
            file.write(data)
        file.flush()
        written = time.perf_counter() - start
        os.fsync(file.fileno())
        return {"blocked": written, "durable": time.perf_counter() - start, "gigabytes": file.tell() / GIGABYTE}


BENCHMARK = Benchmark(
    name="saves",
    module="benchmarks.saves",
    contestants={
        "plain write and fsync": disk,
        "save in place": lambda point: _save(False),
        "save in the background": lambda point: _save(True),
    },
    points={"state": "weights and AdamW moments of 83M parameters, fp32; hashed, flushed and renamed before it counts"},
    columns=[
        Column("blocked", "seconds blocked", ",.2f"),
        Column("durable", "seconds until durable", ",.2f"),
        Column("gigabytes", "GB", ",.2f"),
    ],
    relative_to="plain write and fsync",
    higher_is_better=False,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
