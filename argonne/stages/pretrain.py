"""Pretraining, and `continue`, which is the same from given weights: token windows, next-token loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.config import CHAT_STAGES, Recipe
from argonne.data.dataset import open_training_data
from argonne.parallel.objective import Objective
from argonne.stages.hooks import Shown, show_text
from argonne.stages.session import run_session
from argonne.stages.setup import Session
from argonne.stages.stage import Stage, StageData
from argonne.train.guard import StopWatch
from argonne.train.objectives import next_token, next_token_by_position, next_token_by_row
from argonne.train.trainer import Outcome


def objective(recipe: Recipe, data: StageData) -> Objective:
    """Next-token loss, row by row where sources are told apart."""
    return next_token_by_row if len(data.source_names) > 1 else next_token


def token_windows(recipe: Recipe, state: dict[str, Any] | None, run_folder: Path, allow: frozenset[str]) -> StageData:
    """Windows of token sets or of text: pretrain, continue, midtrain."""
    return open_training_data(recipe.data, recipe.batch, recipe.seed, state=state, run_folder=run_folder, allow=allow)


def shows(recipe: Recipe, data: StageData, micro_rows: int) -> Shown:
    """Of text: the held-out loss by position too."""
    return show_text(recipe, data, micro_rows, next_token_by_position)


PRETRAIN = Stage(objective, token_windows, shows=shows)


@dataclass(frozen=True)
class RunResult:
    """Where a training verb left the run."""

    run: Path
    outcome: Outcome


def run(
    recipe: Recipe,
    run_folder: Path,
    *,
    stage: Stage | None = None,
    resume_from: Path | None = None,
    allow: Iterable[str] = (),
    stop_after_step: int | None = None,
    watch: StopWatch | None = None,
    profile: bool = False,
    data_from_start: bool = False,
    rewind: int | None = None,
    take_over: bool = False,
) -> RunResult:
    """Train `recipe` in `run_folder`, resuming by itself where the run exists. Raises InputError for anything wrong
    with recipe, data or run. Every stage that has a verb is run here.

    `stage`: one's own, instead of the one that the recipe names.
    `watch`: it knows of requests to stop since the command began. `profile`: write a trace of a few steps.
    `rewind`: go back to this step's checkpoint of the run. `take_over`: the process of another machine that has the run
    is dead. `data_from_start`: with a `.pt` of the family as `resume_from`, begin the data at its start whatever the
    file says.
    """
    session = Session(
        recipe=recipe,
        folder=run_folder,
        stage=stage or stage_of(recipe),
        resume_from=resume_from,
        allow=frozenset(allow),
        stop_after_step=stop_after_step,
        watch=watch,
        profile=profile,
        data_from_start=data_from_start,
        rewind=rewind,
        take_over=take_over,
    )
    return RunResult(run_folder, run_session(session))


def stage_of(recipe: Recipe) -> Stage:
    """The stage that `recipe.stage` names; only its own files are opened."""
    if recipe.stage == "dpo":
        from argonne.stages.dpo import DPO

        return DPO
    if recipe.stage in CHAT_STAGES:
        from argonne.stages.sft import SFT

        return SFT
    return PRETRAIN
