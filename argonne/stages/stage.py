"""A stage: its data, its loss, where its weights start, what its telemetry shows. Everything else is the session's and
the loop's.

A stage is made of functions of a module, never of closures: it travels to the workers by pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from argonne.config import Recipe
from argonne.data.loader import Rows
from argonne.model.build import Weights
from argonne.parallel.objective import Objective
from argonne.stages.hooks import Shown, show_text
from argonne.stages.start import Start, build_weights
from argonne.train.data import Data


class StageData(Data, Rows, Protocol):
    """What a stage reads: all that the loop and the loader ask."""


@dataclass(frozen=True)
class Stage:
    """open_data(recipe, state, run_folder, allow) raises InputError for anything wrong with it; the others may look at
    what it returned.

    weights(recipe, start): the model and its tensors in their training dtype. shows(recipe, data, micro_rows): held-out
    loss and samples.
    """

    objective: Callable[[Recipe, StageData], Objective]
    open_data: Callable[[Recipe, dict[str, Any] | None, Path, frozenset[str]], StageData]
    weights: Callable[[Recipe, Start], Weights] = build_weights
    shows: Callable[[Recipe, StageData, int], Shown] = show_text
