"""A stage: its data, its loss, where its weights start. Everything else is the session's and the loop's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from argonne.config import Recipe
from argonne.data.loader import Loader, open_training_data
from argonne.tokens.tokenizer import TextTokenizer
from argonne.train.step import Objective


class Data(Protocol):
    """What a stage reads, as the loop, the log and the checkpoint see it: pure functions of the step."""

    vocab_size: int
    tokenizer: TextTokenizer
    tokenizer_folder: Path

    @property
    def fingerprint(self) -> str: ...
    @property
    def source_names(self) -> list[str]: ...
    @property
    def description(self) -> list[str]: ...
    @property
    def tokens_per_epoch(self) -> int: ...
    @property
    def held_out_windows(self) -> int: ...
    def rows(self, step: int) -> int: ...
    def sequence_length(self, step: int) -> int: ...
    def samples_before(self, step: int) -> int: ...
    def tokens_before(self, step: int) -> int: ...
    def check_steps(self, steps: int) -> None: ...
    def passes(self, step: int) -> dict[str, float]: ...
    def tokens_by_source(self, step: int) -> dict[str, int]: ...
    def state(self, step: int) -> dict[str, Any]: ...
    def held_out_sources(self, windows: int) -> list[str]: ...
    def held_out_batches(self, windows: int, rows: int) -> Iterator[dict[str, Any]]: ...
    def loader(
        self, rank: int, world_size: int, micro_rows: int, *, prefetch: int = 2, pin_memory: bool = False, broadcast: Any = None
    ) -> Loader: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Stage:
    """`open_data(recipe, state, run_folder, allow)` raises InputError for anything wrong with it; `objective` may look at the data."""

    objective: Callable[[Recipe, Data], Objective]
    open_data: Callable[[Recipe, dict[str, Any] | None, Path, frozenset[str]], Data]


def token_windows(recipe: Recipe, state: dict[str, Any] | None, run_folder: Path, allow: frozenset[str]) -> Data:
    """Windows of token sets or of text: pretrain, continue, midtrain."""
    return open_training_data(recipe.data, recipe.batch, recipe.seed, state=state, run_folder=run_folder, allow=allow)


def given_objective(objective: Objective, recipe: Recipe, data: Data) -> Objective:
    """For `functools.partial`: a session travels to its workers by pickle, so a stage is made of functions of a module, never of closures."""
    return objective
