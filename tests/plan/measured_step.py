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
from argonne.train.optim import build_optimizer
from argonne.train.trainer import Progress, Trainer, next_token

STEPS = 3


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
        optim=OptimSection(),
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


class RandomData:
    """Random tokens in the shape of the training data: what the trainer asks of it, no more."""

    source_names = ("random",)

    def __init__(self, recipe: Recipe) -> None:
        self.length = recipe.data.sequence_length
        self.count = recipe.batch.tokens_per_step // self.length
        self.vocabulary = recipe.model.vocab_size or 0

    def loader(self, rank: int, world_size: int, micro_rows: int, **options: Any) -> Any:
        self.micro = micro_rows
        return SimpleNamespace(batch=self.batch, close=lambda: None)

    def batch(self, step: int) -> Any:
        generator = torch.Generator().manual_seed(step)
        sizes = [min(self.micro, self.count - start) for start in range(0, self.count, self.micro)]
        draw = [torch.randint(0, self.vocabulary, (size, self.length + 1), generator=generator) for size in sizes]
        micro = [{"input_ids": ids[:, :-1].contiguous(), "shift_labels": ids[:, 1:].contiguous()} for ids in draw]
        sources = [torch.zeros(size, dtype=torch.int64) for size in sizes]
        tokens = self.count * self.length
        return SimpleNamespace(step=step, micro_batches=micro, valid_tokens=tokens, tokens=tokens, sources=sources, waited_seconds=0.0)

    def samples_before(self, step: int) -> int:
        return step * self.count

    def rows(self, step: int) -> int:
        return self.count

    def sequence_length(self, step: int) -> int:
        return self.length

    def tokens_before(self, step: int) -> int:
        return step * self.count * self.length


def run_steps(case: dict[str, Any]) -> None:
    """Three optimizer steps as the trainer runs them."""
    recipe = recipe_of(case)
    fields = {name: value for name, value in dataclasses.asdict(recipe.model).items() if name not in ("preset", "init_from", "initializer")}
    model = build_model(config_from_fields(fields), seed=recipe.seed)
    model.train()
    optimizer = build_optimizer(model, recipe.optim)
    train = recipe.train
    model.configure_training(
        activation_checkpointing=train.activation_checkpointing,
        checkpointing_stride=train.checkpointing_stride,
        loss=train.loss,
        loss_chunk=train.loss_chunk,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            recipe=recipe,
            run=SimpleNamespace(path=Path(folder)),  # type: ignore[arg-type]
            model=model,
            optimizer=optimizer,
            data=RandomData(recipe),
            mesh=Mesh(torch.device("cpu")),
            objective=next_token,
            services=SimpleNamespace(),  # type: ignore[arg-type]
            metrics=SimpleNamespace(write=lambda *args, **fields: None),  # type: ignore[arg-type]
            watch=SimpleNamespace(reason=lambda: None),  # type: ignore[arg-type]
            total_steps=STEPS,
            micro_rows=case["micro"],
            progress=Progress(),
            state=lambda step: {},
        )
        upcoming = trainer._fetch(0)
        while upcoming is not None:
            batch, valid, _, _ = upcoming()
            upcoming = trainer._step(batch, valid)


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
