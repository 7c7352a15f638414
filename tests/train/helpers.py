"""Reading runs in tests."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from safetensors import safe_open

from argonne.config import Recipe
from argonne.parallel.objective import Objective
from argonne.report.records import read_metrics
from argonne.stages.pretrain import token_windows
from argonne.stages.stage import Stage, StageData

# What must be bit-identical; the rest of a record is speed and memory.
EXACT = ("step", "tokens", "loss", "lr", "grad_norm")


def stage_of(objective: Objective) -> Stage:
    """Token windows under an objective of the test's own; the stage travels to workers where the objective does."""
    return Stage(functools.partial(_given, objective), token_windows)


def _given(objective: Objective, recipe: Recipe, data: StageData) -> Objective:
    return objective


def curve(run: Path) -> list[dict[str, Any]]:
    """The exact part of every logged step, by step."""
    return [{name: record[name] for name in EXACT} for record in read_metrics(run).of("step")]


def stored(folder: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint or model folder as bytes."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            found |= {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 - not a dict
    assert found
    return found
