"""Requests to answers: batches of like length on the engine that serves."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import groupby
from typing import Any

from argonne.evaluate.requests import AnswerRequest
from argonne.serve.engine import Completion, completing

ROWS = 32


def answering(
    model: Any,
    requests: Sequence[AnswerRequest],
    *,
    rows: int = ROWS,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[None, None, list[Completion]]:
    """Answers to every request, in the order given, as work that yields after every token. `rows`: of a batch, which
    holds requests of the same options alone. `progress` is called with (requests done, requests in all).
    """

    def kind(number: int) -> tuple[Any, ...]:
        return requests[number].options, requests[number].stops

    answers: dict[int, Completion] = {}
    order = sorted(range(len(requests)), key=lambda number: (repr(kind(number)), -len(requests[number].ids)))
    for (options, stops), group in groupby(order, kind):
        numbers = list(group)
        for start in range(0, len(numbers), rows):
            batch = numbers[start : start + rows]
            prompts = [requests[number].ids.tolist() for number in batch]
            found = yield from completing(model, prompts, options, stops)
            answers.update(zip(batch, found, strict=True))
            if progress is not None:
                progress(len(answers), len(requests))
    return [answers[number] for number in range(len(requests))]
