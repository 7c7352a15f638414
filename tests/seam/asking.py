"""A stage that does not exist: its data asks the current weights. What the model finds hard now weighs more in the
loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argonne.config import Recipe
from argonne.data.dataset import TrainingData
from argonne.data.loader import Array
from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import Head, Loss, MicroBatch, Objective
from argonne.parallel.parallelise import Parallelised
from argonne.stages.pretrain import token_windows
from argonne.stages.stage import Stage, StageData


class Weighed(TrainingData):
    """Token windows, each with the loss that the weights of this very step give it."""

    reads_model = True

    def attach(self, model: Parallelised, mesh: Mesh) -> None:  # type: ignore[override]
        super().attach(model, mesh)
        self.model = model

    def read(self, step: int, first: int, count: int, rows: int) -> dict[str, Array]:
        arrays = super().read(step, first, count, rows)
        tensors = {name: torch.from_numpy(array.values) for name, array in arrays.items()}
        found = self.model.evaluate({**tensors, "weight": torch.ones(rows)}).rows
        assert found is not None
        weight = 1.0 + found / tensors["tokens"].clamp_min(1)
        return {**arrays, "weight": Array(weight.float().numpy(), 1.0)}


def weighed(head: Head, hidden: Tensor, micro: MicroBatch) -> Loss:
    log_p, _ = head.token_log_probs(hidden, micro["shift_labels"])
    rows = -log_p.sum(dim=1)
    weight = micro["weight"].to(rows.dtype) if "weight" in micro else torch.ones_like(rows)
    return Loss((rows * weight).sum(), rows=rows.detach())


def objective(recipe: Recipe, data: StageData) -> Objective:
    return weighed


def open_data(recipe: Recipe, state: dict[str, Any] | None, run_folder: Path, allow: frozenset[str]) -> StageData:
    windows: Any = token_windows(recipe, state, run_folder, allow)
    return Weighed(windows.data, windows.sources, windows.mixture, windows.tokenizer)


STAGE = Stage(objective, open_data)
