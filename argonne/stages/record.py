"""What a session writes about itself: config, manifest and banner at its start, the state beside the tensors of each checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from argonne.config import Recipe
from argonne.parallel.mesh import Mesh
from argonne.recipe import to_toml, to_tree
from argonne.stages.start import Start
from argonne.train.data import Data
from argonne.train.run import RunFolder
from argonne.train.schedule import curve
from argonne.train.trainer import Progress


def record_start(
    run: RunFolder,
    recipe: Recipe,
    data: Data,
    model: nn.Module,
    start: Start,
    mesh: Mesh,
    micro_rows: int,
    total_steps: int,
    say: Callable[[str], None],
) -> None:
    """Write config and manifest, print what is about to run."""

    parameters = sum(parameter.numel() for parameter in model.parameters())
    run.clear_markers()
    run.write_config(to_toml(recipe))
    run.write_manifest(
        {
            "stage": recipe.stage,
            "parameters": parameters,
            "total_steps": total_steps,
            "data_fingerprint": data.fingerprint,
            "tokenizer_fingerprint": data.tokenizer.fingerprint,
            "world_size": mesh.world_size,
            "device": str(mesh.device),
            "micro_rows": micro_rows,
            "parent": start.parent,
        }
    )
    for text in data.description:
        say(text)
    step = int(start.progress.get("step", 0))
    rows, length = data.rows(step), data.sequence_length(step)
    say(
        f"model: {parameters:,} parameters, {recipe.model.num_hidden_layers} layers, {recipe.model.preset or 'from ' + str(recipe.model.init_from)}"
    )
    say(
        f"batch: {rows * length:,} tokens a step = {rows} rows x {length}, {micro_rows} rows a micro-batch "
        f"on {mesh.world_size} x {mesh.device.type}; {total_steps:,} steps, {data.tokens_before(total_steps):,} tokens"
    )
    rates = "  ".join(f"{step}: {rate:.3g}" for step, rate in curve(total_steps, recipe.optim, recipe.schedule))
    say(f"learning rate at steps {rates}")
    say(start.description)


def run_state(step: int, recipe: Recipe, data: Data, run: RunFolder, progress: Progress, mesh: Mesh, start: Start) -> dict[str, Any]:
    """state.json: counts and identities, never buffers."""

    return {
        "run_id": run.run_id,
        "tokens": data.tokens_before(step),
        "samples": data.samples_before(step),
        "progress": dataclasses.asdict(progress),
        "recipe": to_tree(recipe),
        "data": data.state(step),
        "tokenizer_fingerprint": data.tokenizer.fingerprint,
        "world_size": mesh.world_size,
        "parent": start.parent,
    }
