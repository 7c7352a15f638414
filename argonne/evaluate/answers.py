"""Requests to answers, on the engine that serves."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from argonne.evaluate.requests import AnswerRequest
from argonne.serve.decoder import Answer
from argonne.serve.engine import Completion, Spoken, completion_of, decoder_for
from argonne.serve.options import Shaping
from argonne.tokens.tokenizer import TextTokenizer

ROWS = 64


def answering(
    model: Any,
    requests: Sequence[AnswerRequest],
    *,
    tokenizer: TextTokenizer | None = None,
    rows: int = ROWS,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
    known: Mapping[int, Completion] | None = None,
    keep: Callable[[Mapping[int, Completion]], None] | None = None,
) -> Generator[None, None, dict[int, Completion]]:
    """Answers to every request by number, at most `rows` at once, as work that yields after every step. tokenizer: for
    requests with stop texts.

    `share`, `progress`, `known`, `keep`: as in argonne.evaluate.scorer. Passes have the same number of rows whatever is
    known, so that answers are the same too.
    """
    prompts = [request.ids.tolist() for request in requests]
    decoder = decoder_for(model, prompts, [request.options.max_new_tokens for request in requests], rows)
    found, running, spoken = dict(known or {}), dict[Answer, int](), dict[Answer, Spoken]()
    for number in range(share[0], len(requests), share[1]):
        if number in found:
            continue
        request = requests[number]
        answer = decoder.submit(
            prompts[number], request.options, request.stops, shaping=Shaping(stop=request.stop_texts)
        )
        running[answer] = number
        if request.stop_texts:
            assert tokenizer is not None
            spoken[answer] = Spoken(decoder, answer, tokenizer)
    while decoder.busy:
        fresh = {}
        for answer in decoder.step():
            if answer in spoken:
                spoken[answer].more()
            if answer.stop is not None:
                fresh[running[answer]] = completion_of(answer)
        found |= fresh
        if fresh and keep is not None:
            keep(fresh)
        if progress is not None:
            progress(len(found), len(requests))
        yield
    return found
