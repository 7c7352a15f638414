"""Run as a script: the trainer's own step on a model of given fields, in a process of its own; prints what memory it took as JSON.

Usage: python measured_step.py '{"model": {...}, "sequence_length": 128, "rows": 4, "micro": 2, "checkpointing": "none", "loss": "full"}'
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import argonne.model  # noqa: F401 part of the imports whose memory is not the run's
from argonne.config import BatchSection, DataSection, ModelSection, OptimSection, Recipe, ScheduleSection, TrainSection
from argonne.model.build import build_model, config_from_fields
from argonne.parallel.mesh import Mesh
from argonne.train.allocator import return_freed_memory
from argonne.train.optim import build_optimizer
from argonne.train.precision import Precision
from argonne.train.step import Stepper, next_token

STEPS = 2


def memory_kib(field: str) -> int:
    """VmRSS or VmHWM (the highest RSS so far) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def recipe_of(case: dict[str, Any]) -> Recipe:
    """The recipe of a case: fp32 on the CPU."""
    return Recipe(
        model=ModelSection(**case["model"]),
        data=DataSection(sequence_length=case["sequence_length"]),
        batch=BatchSection(tokens_per_step=case["rows"] * case["sequence_length"], micro=case["micro"]),
        optim=OptimSection(name=case.get("optimizer", "adamw")),
        schedule=ScheduleSection(kind="constant"),
        train=TrainSection(
            steps=STEPS,
            precision="fp32",
            device="cpu",
            activation_checkpointing=case.get("checkpointing", "none"),
            checkpointing_stride=case.get("stride", 2),
            loss=case.get("loss", "full"),
            loss_chunk=case.get("loss_chunk", 0),
        ),
    )


def random_batch(recipe: Recipe, step: int) -> Any:
    """A global batch of random tokens, cut into micro-batches as the loader cuts it."""
    generator = torch.Generator().manual_seed(step)
    length, micro = recipe.data.sequence_length, int(recipe.batch.micro)
    rows = recipe.batch.tokens_per_step // length
    sizes = [min(micro, rows - start) for start in range(0, rows, micro)]
    draws = [torch.randint(0, recipe.model.vocab_size or 0, (size, length + 1), generator=generator) for size in sizes]
    batches = [{"input_ids": ids[:, :-1].contiguous(), "shift_labels": ids[:, 1:].contiguous()} for ids in draws]
    return SimpleNamespace(step=step, micro_batches=batches, sources=[torch.zeros(size, dtype=torch.int64) for size in sizes])


def run_steps(case: dict[str, Any]) -> None:
    """Optimizer steps as the trainer runs them."""
    recipe = recipe_of(case)
    fields = {name: value for name, value in dataclasses.asdict(recipe.model).items() if name not in ("preset", "init_from", "initializer")}
    model = build_model(config_from_fields(fields), seed=recipe.seed)
    model.train()
    optimizer = build_optimizer(model, recipe.optim)
    train = recipe.train
    if not case.get("heap"):
        assert return_freed_memory()
    model.configure_training(
        activation_checkpointing=train.activation_checkpointing,
        checkpointing_stride=train.checkpointing_stride,
        loss=train.loss,
        loss_chunk=train.loss_chunk,
    )
    mesh = Mesh(torch.device("cpu"))
    precision = Precision("fp32", mesh.device)
    loader = SimpleNamespace(micro_rows=case["micro"])
    stepper = Stepper(model, optimizer, next_token, precision, mesh, loader, grad_clip=1.0, run=Path("."), say=print)
    for step in range(STEPS):
        stepper.run_step(random_batch(recipe, step), recipe.batch.tokens_per_step, seed=step)


def main() -> None:
    case = json.loads(sys.argv[1])
    before = memory_kib("VmRSS")
    result: dict[str, Any] = {}
    if case.get("profile"):  # which tensors are alive: torch's own count of allocated bytes
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            run_steps(case)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            profiler.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_text())["traceEvents"]
        result["tensors"] = max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")
    else:
        run_steps(case)
    result |= {"imports": before * 1024, "peak": (memory_kib("VmHWM") - before) * 1024}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
