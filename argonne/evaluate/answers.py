"""Requests to answers, on the engine that serves."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from argonne.evaluate.requests import AnswerRequest
from argonne.serve.engine import Completion, completion_of, decoder_for

ROWS = 64


def answering(
    model: Any,
    requests: Sequence[AnswerRequest],
    *,
    rows: int = ROWS,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[None, None, list[Completion]]:
    """Answers to every request, in the order given, at most `rows` at once, as work that yields after every step.
    `progress` is called with (requests done, requests in all).
    """
    prompts = [request.ids.tolist() for request in requests]
    decoder = decoder_for(model, prompts, [request.options.max_new_tokens for request in requests], rows)
    answers = [
        decoder.submit(prompt, request.options, request.stops)
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    done = 0
    while decoder.busy:
        done += sum(changed.stop is not None for changed in decoder.step())
        if progress is not None:
            progress(done, len(answers))
        yield
    return list(map(completion_of, answers))
