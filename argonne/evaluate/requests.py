"""What a task asks of a model, and what comes back. Every task is requests -> model -> metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class ScoreRequest:
    """Ask for the log-probability of each of `ids[start:]`, given all the ids before it. `ids` is (n,) integers, 1 <=
    start < n.
    """

    ids: np.ndarray
    start: int = 1


@dataclass(frozen=True)
class Score:
    """(n - start,) float64 natural log-probabilities, and whether each scored id was the model's first choice."""

    log_probabilities: np.ndarray
    greedy: np.ndarray


@dataclass(frozen=True)
class TaskContext:
    """What a task may look at when it writes its requests."""

    tokenizer: Any
    context_length: int
    data: Any = None
    shots: int | None = None
    limit: int | None = None


class Task(Protocol):
    """One measurement. `requests` is called once, then `measure` with the answers in the same order."""

    name: str

    def requests(self, context: TaskContext) -> list[ScoreRequest]: ...

    def measure(self, scores: list[Score]) -> dict[str, Any]:
        """Numbers, counts and standard errors."""
        ...
