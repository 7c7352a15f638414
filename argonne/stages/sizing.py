"""How long a run is and how it fits its devices: steps, micro-batch, what is recomputed, which loss. Nothing here changes what is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import MicroBatch, Objective
from argonne.parallel.parallelise import Parallelised
from argonne.plan import StepChoice, choose_step, plan_of_run
from argonne.train.data import Batches, Data
from argonne.train.precision import Precision
from argonne.train.probe import probe_micro_rows
from argonne.train.recovery import recorded_micro_rows


def steps_of(recipe: Recipe, data: Data) -> int:
    """Optimizer steps of the run. A length in tokens or epochs is rounded down to whole steps: never more than was asked for."""
    train = recipe.train
    if train.steps is not None:
        total = train.steps
    else:
        tokens = train.tokens if train.tokens is not None else int((train.epochs or 0) * data.tokens_per_epoch)
        total = _steps_within(data, tokens)
        if total < 1:
            raise InputError(
                f"train: {tokens:,} tokens make no whole step of batch.tokens_per_step = {recipe.batch.tokens_per_step:,}; "
                "train longer or take a smaller batch"
            )
    if total < 1:
        raise InputError(f"train.steps: found {total}, expected at least 1")
    data.check_steps(total)
    return total


def _steps_within(data: Data, tokens: int) -> int:
    """The most steps that draw at most `tokens` tokens, whatever changes of batch lie between."""
    low, high = 0, 1
    while data.tokens_before(high) <= tokens:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if data.tokens_before(middle) <= tokens else (low, middle)
    return low


def choose(recipe: Recipe, mesh: Mesh) -> StepChoice:
    """What `auto` comes to here: micro-batch, activation checkpointing and loss, by the memory of one of the run's devices."""

    return choose_step(recipe, **_device_facts(mesh), world_size=mesh.world_size)


def plan_of(recipe: Recipe, choice: StepChoice, micro_rows: int, mesh: Mesh) -> dict[str, Any]:
    """The plan of the run as it starts: `inspect` sets it beside what was measured."""

    settled = dataclasses.replace(choice, micro_rows=micro_rows)
    return plan_of_run(recipe, settled, **_device_facts(mesh), world_size=mesh.world_size)


def _device_facts(mesh: Mesh) -> dict[str, Any]:

    if mesh.device.type == "cuda":
        facts = torch.cuda.get_device_properties(mesh.device)
        return {"device_name": facts.name, "device_memory": float(facts.total_memory)}
    return {"device_name": "cpu"}


def choose_micro_rows(
    model: Parallelised,
    objective: Objective,
    precision: Precision,
    recipe: Recipe,
    data: Data,
    loader: Batches,
    step: int,
    mesh: Mesh,
    choice: StepChoice,
    run: Path,
) -> int:
    """Rows of one forward pass on one device: the recipe's number; on a GPU found by trying, upward from the plan's; 4,096 tokens on the CPU.

    Never more than an earlier session of the run had to back off to.
    """
    rows, length = -(-data.rows(step) // mesh.data_size), data.sequence_length(step)
    recorded = recorded_micro_rows(run)
    share = min(rows, recorded or rows)
    if isinstance(recipe.batch.micro, int):
        return min(recipe.batch.micro, share)
    if mesh.device.type != "cuda" or model.forward != "alone":
        return max(1, min(share, choice.micro_rows, 4096 // length))
    if recorded is not None:
        return share

    def micro_of(rows: int) -> MicroBatch:
        loader.set_micro_rows(rows)
        return loader.batch(step).micro_batches[0]

    return probe_micro_rows(model.plain, objective, precision, mesh, micro_of, guess=choice.micro_rows, most=share)


def configure_model(model: Any, recipe: Recipe, choice: StepChoice) -> None:
    """Training-only switches of the model: the recipe's, and for `auto` what was chosen by memory."""
    model.configure_training(
        attention=recipe.train.attention,
        activation_checkpointing=choice.activation_checkpointing,
        checkpointing_stride=choice.checkpointing_stride,
        loss=choice.loss,
        loss_chunk=recipe.train.loss_chunk,
        z_loss=recipe.train.z_loss,
    )
