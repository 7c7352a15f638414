"""Preference tuning: packed pairs, the losses of argonne/train/preference.py, the reference's scores made once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from argonne import files
from argonne.config import Recipe
from argonne.data.pair_data import REFERENCES, PairData, Reference
from argonne.model.load import resolve_model
from argonne.model.stored import hashes_of_weights
from argonne.parallel.objective import Head, Loss, MicroBatch, Objective
from argonne.parallel.parallelise import Parallelised
from argonne.stages.hooks import Shown
from argonne.stages.sft import cache_of, open_chat, show_answers
from argonne.stages.stage import Stage, StageData
from argonne.train.data import Data
from argonne.train.preference import loss_at_start, pair_scores, preference

REFERENCE = "reference.json"  # in the run: whose scores it trains against
SETTLED_STEPS = 20  # after the warmup, until a loss that has not moved is told
MOVED = 0.01  # share of its start


def pairs(recipe: Recipe, state: dict[str, Any] | None, run_folder: Path, allow: frozenset[str]) -> StageData:
    """Preference pairs, and where the reference's scores of them are kept."""
    data = open_chat(recipe, PairData, state, run_folder, allow)
    begun = state is not None and state["step"] > 0
    data.reference = Reference(cache_of(recipe, run_folder), _identity(recipe, run_folder), begun, scores)
    return data


def _identity(recipe: Recipe, run_folder: Path) -> str:
    """Of the weights that training starts with, and how they are run. Written into the run when it begins: what lies
    under their path later may be another.
    """
    kept = run_folder / REFERENCE
    with files.one_at_a_time(cache_of(recipe, run_folder) / REFERENCES / ".lock"):  # one process reads gigabytes
        if kept.is_file():
            return str(files.read_json(kept)["model"])
        if recipe.model.init_from is None:
            return "unknown"  # of --resume-from alone: the run that began knows
        folder = resolve_model(recipe.model.init_from).folder
        found = files.fingerprint([hashes_of_weights(folder), recipe.train.precision])
        files.write_json(kept, {"model": found, "init_from": recipe.model.init_from})
        return found


def scores(model: Parallelised, micro: MicroBatch) -> np.ndarray:
    """(rows, P, 2) float32 scores of a micro-batch's pairs."""

    def objective(head: Head, hidden: Tensor, placed: MicroBatch) -> Loss:
        sums = pair_scores(head, hidden, placed)[0]
        return Loss(sums.sum(), sums)

    rows = model.evaluate(micro, objective).rows
    assert rows is not None
    return rows.float().cpu().numpy()


def objective(recipe: Recipe, data: StageData) -> Objective:
    return preference(recipe.dpo)


@dataclasses.dataclass
class Watch:
    """Tells once, when it can be known, that the loss stands where it began."""

    recipe: Recipe
    told: bool = False

    def __call__(self, step: int, record: dict[str, Any]) -> str | None:
        metrics, dpo = record.get("metrics") or {}, self.recipe.dpo
        loss = metrics.get("loss/pair")
        if self.told or loss is None or step < self.recipe.schedule.warmup + SETTLED_STEPS:
            return None
        self.told, begin = True, loss_at_start(dpo)
        if abs(loss - begin) > MOVED * begin:
            return None
        advice = ', take dpo.scores = "sum"' if dpo.scores == "mean" else ""
        return (
            f"the preference loss {loss:.4f} has not left its start {begin:.4f} (margin {metrics['margin']:.2g}): "
            f"raise optim.lr ({self.recipe.optim.lr:g}) or dpo.beta ({dpo.beta:g}){advice}"
        )


def show(recipe: Recipe, data: Data, micro_rows: int) -> Shown:
    """As of a chat stage, and whether the loss moves."""
    return dataclasses.replace(show_answers(recipe, data, micro_rows), judge=Watch(recipe))


DPO = Stage(objective, pairs, shows=show)
