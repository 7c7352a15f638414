"""What a task asks of a model, and what comes back. Every task is requests -> model -> metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from argonne.data.chat import ChatTemplate
from argonne.serve.engine import Completion
from argonne.serve.options import SamplingOptions
from argonne.tokens.tokenizer import TextTokenizer


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
class AnswerRequest:
    """Ask for what follows `ids`, (n,) integers with n >= 1, up to one of `stops`, or until one of `stop_texts` stands
    in it.
    """

    ids: np.ndarray
    options: SamplingOptions
    stops: tuple[int, ...]
    stop_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskContext:
    """What a task may look at when it writes its requests. data: what was named for it; own_data: the token set that
    the run was trained on. tokens: an answer's at most, where that was said. samples: sampled answers to each question
    beside the greedy one. template: how the model is asked; None: as what lies beside the tokenizer says.
    """

    tokenizer: TextTokenizer
    context_length: int
    data: str | Path | None = None
    own_data: str | None = None
    shots: int | None = None
    limit: int | None = None
    tokens: int | None = None
    samples: int = 0
    template: ChatTemplate | None = None


# The number by which models are compared, and whether "lower" or "higher" is better; None where there is none.
Headline = tuple[str, str] | None


class ScoredTask(Protocol):
    """A measurement of log-probabilities. `requests` is called once, then `measure` with the answers in the same
    order: numbers, counts and standard errors. `lines`: the same for a person.
    """

    name: str
    asks: Literal["scores"]
    headline: Headline

    def requests(self, context: TaskContext) -> Sequence[ScoreRequest]: ...
    def measure(self, found: Sequence[Score]) -> dict[str, Any]: ...
    def lines(self, values: dict[str, Any]) -> list[str]: ...


class AnsweredTask(Protocol):
    """The same for a measurement of what the model writes."""

    name: str
    asks: Literal["answers"]
    headline: Headline

    def requests(self, context: TaskContext) -> Sequence[AnswerRequest]: ...
    def measure(self, found: Sequence[Completion]) -> dict[str, Any]: ...
    def lines(self, values: dict[str, Any]) -> list[str]: ...


Task = ScoredTask | AnsweredTask
