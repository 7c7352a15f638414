"""Run as a script: the trainer's own step on a model of given fields, in a process of its own; prints what memory it
took as JSON.

Usage: python measured_step.py '{"model": {...}, "sequence_length": 128, "rows": 4, "micro": 2, "checkpointing": "none",
"loss": "full"}'

With "shard": 2 or "context": 2 it is one rank of two, and finds the other as under torchrun. Rows of shards are then a
rank's own.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import argonne.model  # noqa: F401 part of the imports whose memory is not the run's
from argonne.config import BatchSection, DataSection, ModelSection, OptimSection, Recipe, ScheduleSection, TrainSection
from argonne.data.loader import Batch
from argonne.model.build import config_from_fields, fresh_weights
from argonne.operation import ParallelSection
from argonne.parallel.context import CONTEXT
from argonne.parallel.mesh import open_mesh
from argonne.parallel.parallelise import REPLICATED
from argonne.parallel.shard import SHARDED
from argonne.train.allocator import return_freed_memory
from argonne.train.objectives import next_token
from argonne.train.optim import Precision, build_optimizer
from argonne.train.trainer import Trained, take_step

STEPS = 2


def memory_kib(field: str) -> int:
    """VmRSS or VmHWM (the highest RSS so far) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def recipe_of(case: dict[str, Any]) -> Recipe:
    """The recipe of a case: on the CPU, fp32 where it names nothing else."""
    return Recipe(
        model=ModelSection(**case["model"]),
        data=DataSection(sequence_length=case["sequence_length"]),
        batch=BatchSection(tokens_per_step=case["rows"] * case["sequence_length"], micro=case["micro"]),
        optim=OptimSection(name=case.get("optimizer", "adamw")),
        schedule=ScheduleSection(kind="constant"),
        parallel=ParallelSection(shard=case.get("shard", 1), context=case.get("context", 1)),
        train=TrainSection(
            steps=STEPS,
            precision=case.get("precision", "fp32"),
            device="cpu",
            activation_checkpointing=case.get("checkpointing", "none"),
            checkpointing_stride=case.get("stride", 2),
            loss=case.get("loss", "full"),
            loss_chunk=case.get("loss_chunk", 0),
        ),
    )


def random_batch(recipe: Recipe, step: int) -> Batch:
    """A global batch of random tokens, cut into micro-batches as the loader cuts it."""
    generator = torch.Generator().manual_seed(step)
    length, micro = recipe.data.sequence_length, int(recipe.batch.micro)
    rows = recipe.batch.tokens_per_step // length
    sizes = [min(micro, rows - start) for start in range(0, rows, micro)]
    draws = [torch.randint(0, recipe.model.vocab_size or 0, (size, length + 1), generator=generator) for size in sizes]
    micro_batches = [{"input_ids": ids[:, :-1].contiguous(), "shift_labels": ids[:, 1:].contiguous()} for ids in draws]
    return Batch(step, micro_batches, rows * length, 0.0)


def run_steps(case: dict[str, Any]) -> None:
    """Optimizer steps as the trainer runs them."""
    recipe = recipe_of(case)
    fields = {
        name: value
        for name, value in dataclasses.asdict(recipe.model).items()
        if name not in ("preset", "init_from", "initializer")
    }
    train = recipe.train
    if not case.get("heap"):
        assert return_freed_memory()
    with open_mesh(recipe.parallel, "cpu") as mesh:
        precision = Precision(train.precision, mesh.device)
        weights = fresh_weights(config_from_fields(fields), seed=recipe.seed)
        mode = CONTEXT if mesh.context > 1 else SHARDED if mesh.shard > 1 else REPLICATED
        parallelised = mode.parallelise(weights, mesh, next_token, precision)
        plain: Any = parallelised.plain
        plain.train()
        plain.configure_training(
            activation_checkpointing=train.activation_checkpointing,
            checkpointing_stride=train.checkpointing_stride,
            loss=train.loss,
            loss_chunk=train.loss_chunk,
        )
        trained = Trained(parallelised, build_optimizer(parallelised.model, recipe.optim), precision)
        for step in range(STEPS):
            take_step(trained, random_batch(recipe, step), recipe.batch.tokens_per_step, recipe.optim.lr, grad_clip=1.0)


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
