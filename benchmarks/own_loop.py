"""The project's own training loop, timed: `argonne.train.trainer.Trainer` as a training verb runs it, on one batch that
lies in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from argonne.config import Recipe
from argonne.data.loader import Batch
from argonne.recipe import build, resolve


def make_recipe(preset: str, shape: dict[str, int], **train: Any) -> Recipe:
    """The preset with the shape's sizes; 3.0 keeps its window (256 at full size, a quarter of the length here) on odd
    layers.
    """
    fields = {
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape.get("head_dim", shape["hidden"] // shape["heads"]),
        "intermediate_size": shape["mlp"],
        "max_position_embeddings": shape["length"],
    }
    if preset.endswith("3.0"):
        fields["sliding_window"] = shape.get("window", shape["length"] // 4)
    tree = {
        "model": {"preset": preset, **fields},
        "data": {"sequence_length": shape["length"]},
        "batch": {"tokens_per_step": shape["rows"] * shape["length"], "micro": shape.get("micro", shape["rows"])},
        "optim": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "grad_clip": 1.0},
        "schedule": {"kind": "constant"},
        "train": {"steps": 1_000_000, **train},
        "log": {"every_steps": 1_000_000, "tensorboard": False},
        "checkpoint": {"every_minutes": 0.0},
    }
    recipe: Recipe = resolve(build(Recipe, tree))
    return recipe


class _Memory:
    """Data that hands out one batch again and again, and notes when each step ends: when the next
    batch is asked for.
    """

    source_names = ("memory",)
    unit, reads_model, vocab_size = "tokens", False, 0

    def __init__(
        self, ids: torch.Tensor, micro_rows: int, steps: int, warm_up: int, device: str, after_first: Callable[[], None]
    ) -> None:
        self.ids, self.micro_rows, self.steps, self.warm_up, self.device, self.after_first = (
            ids,
            micro_rows,
            steps,
            warm_up,
            device,
            after_first,
        )
        self.ends: list[float] = []

    def batch(self, step: int) -> Batch:
        """The batch of `step`, after the step before has ended. On CUDA the device is waited for only at the first and
        the last step.
        """
        if step:
            if self.device == "cuda" and step in (self.warm_up, self.warm_up + self.steps):
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            if step == self.warm_up:
                self.after_first()
            if step == self.warm_up + self.steps:
                raise _Enough
        pieces = self.ids.split(self.micro_rows)
        micro = [
            {"input_ids": piece[:, :-1].contiguous(), "shift_labels": piece[:, 1:].contiguous()} for piece in pieces
        ]
        return Batch(step, micro, self.tokens_before(1), 0.0)

    reads_alone = True

    def set_micro_rows(self, rows: int) -> None:
        raise RuntimeError("the micro-batch of a benchmark does not change")

    def tokens_before(self, step: int) -> int:
        return step * self.ids.shape[0] * (self.ids.shape[1] - 1)

    def samples_before(self, step: int) -> int:
        return step * self.ids.shape[0]

    def rows(self, step: int) -> int:
        return int(self.ids.shape[0])

    def tokens_by_source(self, step: int) -> dict[str, int]:
        return {"memory": self.tokens_before(step)}

    def passes(self, step: int) -> dict[str, float]:
        return {"memory": float(step)}

    def close(self) -> None:
        """Nothing is open."""


class _Enough(Exception):
    """The measured steps are done."""


def timed_steps(
    recipe: Recipe,
    ids: torch.Tensor,
    folder: Path,
    steps: int,
    *,
    warm_up: int = 1,
    device: str = "cpu",
    after_first: Callable[[], None] = lambda: None,
) -> float:
    """Seconds a step: the median of `steps` on the CPU, their mean on CUDA, after `warm_up` steps. `ids` is (rows,
    length + 1).
    """
    from argonne.model.build import build_model, config_from_fields
    from argonne.parallel.compile import compile_blocks
    from argonne.parallel.mesh import Mesh
    from argonne.parallel.parallelise import in_one_call
    from argonne.plan import choose_setup
    from argonne.stages.setup import configure_model, planned_device
    from argonne.stages.start import architecture_fields
    from argonne.train.guard import StopWatch
    from argonne.train.objectives import next_token
    from argonne.train.optim import Precision, build_optimizer
    from argonne.train.run import RunFolder
    from argonne.train.saving import Progress
    from argonne.train.telemetry import MetricsLog
    from argonne.train.trainer import Hooks, Trained, Trainer

    mesh = Mesh(device=torch.device(device))
    model: Any = build_model(config_from_fields(architecture_fields(recipe.model)), seed=0, device=device).train()
    configure_model(model, recipe, choose_setup(recipe, planned_device(mesh.device)))
    precision = Precision(recipe.train.precision, mesh.device)
    parallelised = in_one_call(model, model, mesh, next_token, precision)
    optimizer = build_optimizer(model, recipe.optim, mesh)
    if compiled := recipe.train.compile == "on" or (recipe.train.compile == "auto" and device == "cuda"):
        compile_blocks(model)
    data: Any = _Memory(ids, int(recipe.batch.micro), steps, warm_up, device, after_first)
    trainer = Trainer(
        recipe,
        RunFolder(folder),
        mesh,
        Trained(parallelised, optimizer, precision, compiled),
        data,
        data,
        Hooks(export=lambda model: None, checkpoint_files=lambda folder: None, state=lambda step: {}),
        metrics=MetricsLog(folder, recipe.log, enabled=False),
        watch=StopWatch(recipe.stop),
        progress=Progress(),
        total_steps=1_000_000,
    )
    with contextlib.suppress(_Enough):
        trainer.fit()
    ends = data.ends[warm_up - 1 :]
    gaps = [late - early for early, late in itertools.pairwise(ends)]
    return statistics.median(gaps) if device == "cpu" else (ends[-1] - ends[0]) / steps
