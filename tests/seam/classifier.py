"""A stage that does not exist: a sequence classifier with a float target of its own, divided by sequences, with an
accuracy beside the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from argonne.config import Recipe
from argonne.data.dataset import TrainingData
from argonne.data.loader import Array
from argonne.parallel.objective import Head, Loss, MicroBatch, Objective
from argonne.stages.pretrain import token_windows
from argonne.stages.stage import Stage, StageData


class Labelled(TrainingData):
    """Token windows whose target says whether the last token is in the upper half of 512."""

    unit = "sequences"

    def read(self, step: int, first: int, count: int, rows: int) -> dict[str, Array]:
        arrays = super().read(step, first, count, rows)
        target = (arrays["input_ids"].values[:, -1] >= 256).astype(np.float32)
        real = (arrays["source"].values >= 0).astype(np.int64)
        return {
            "input_ids": arrays["input_ids"],
            "source": arrays["source"],
            "target": Array(target, 0.0),
            "sequences": Array(real, 0),
        }

    def held_out(self, windows: int, rows: int) -> Iterator[Mapping[str, Tensor]]:
        for batch in super().held_out(windows, rows):
            target = (batch["input_ids"][:, -1] >= 256).float()
            yield {
                "input_ids": batch["input_ids"],
                "source": batch["source"],
                "target": target,
                "sequences": torch.ones(len(target)).long(),
            }


def classify(head: Head, hidden: Tensor, micro: MicroBatch) -> Loss:
    score = head.logits(hidden[:, -1:])[:, 0, 0]
    counted, right = micro["sequences"], (score > 0).float() == micro["target"]
    losses = binary_cross_entropy_with_logits(score, micro["target"].to(score.dtype), reduction="none") * counted
    return Loss(losses.sum(), metrics={"accuracy": ((right * counted).sum(), counted.sum())})


def objective(recipe: Recipe, data: StageData) -> Objective:
    return classify


def open_data(recipe: Recipe, state: dict[str, Any] | None, run_folder: Path, allow: frozenset[str]) -> StageData:
    windows: Any = token_windows(recipe, state, run_folder, allow)
    return Labelled(windows.data, windows.sources, windows.mixture, windows.tokenizer)


STAGE = Stage(objective, open_data)
