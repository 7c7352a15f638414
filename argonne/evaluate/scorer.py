"""Requests to log-probabilities: batches of like length, nothing cached, nothing random.

Requests with the same input, such as the answers of one token to a question, share its pass, and logits are made only
where something is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from argonne.errors import InputError
from argonne.evaluate.requests import Score, ScoreRequest

TOKENS_A_BATCH = 4096
LOGITS_AT_ONCE = 1 << 26


def scoring(
    model: Any,
    requests: Sequence[ScoreRequest],
    *,
    tokens_a_batch: int | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
    known: Mapping[int, Score] | None = None,
    keep: Callable[[Mapping[int, Score]], None] | None = None,
) -> Generator[None, None, dict[int, Score]]:
    """Answers to every request by number, as work that yields after every batch. The model's mode is put back after.

    `share`: (first, step) of the batches that are answered here, where others answer the rest. `known`: answers that
    are there already; batches are the same whatever is known, so that answers are too. `keep` gets the new ones of each
    batch. `progress` is called with (requests done, requests in all). Raises InputError where a request is longer than
    the model's context plus one, or the model's log-probabilities are not finite.
    """
    longest = int(model.config.max_position_embeddings)
    for request in requests:
        if not 1 <= request.start < len(request.ids) <= longest + 1:
            raise InputError(
                f"request: {len(request.ids):,} ids scored from {request.start}, expected 1 <= start < ids <= context "
                f"{longest:,} + 1"
            )
    answers = dict(known or {})
    training = model.training
    model.eval()
    try:
        for batch in islice(_batches(requests, tokens_a_batch or TOKENS_A_BATCH), share[0], None, share[1]):
            numbers = [number for group in batch for number in group]
            if answers.keys() >= set(numbers):
                continue
            found = _score_batch(model, [[requests[number] for number in group] for group in batch])
            fresh = {number: score for number, score in zip(numbers, found, strict=True) if number not in answers}
            answers |= fresh
            if keep is not None:
                keep(fresh)
            if progress is not None:
                progress(len(answers), len(requests))
            yield
    finally:
        model.train(training)
    return answers


def _batches(requests: Sequence[ScoreRequest], tokens_a_batch: int) -> Iterator[list[list[int]]]:
    """Numbers of requests, those with the same input together, longest first, so that padding is small and the largest
    batch comes first.
    """
    alike: dict[bytes, list[int]] = {}
    for number, request in enumerate(requests):
        alike.setdefault(request.ids[:-1].tobytes(), []).append(number)
    batch: list[list[int]] = []
    for group in sorted(alike.values(), key=lambda group: -len(requests[group[0]].ids)):
        if batch and (len(batch) + 1) * (len(requests[batch[0][0]].ids) - 1) > tokens_a_batch:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _score_batch(model: Any, batch: Sequence[Sequence[ScoreRequest]]) -> list[Score]:
    """Of requests with one input each group. Padding is on the right, where causal attention never sees it."""
    width = max(len(group[0].ids) for group in batch) - 1
    inputs = np.zeros((len(batch), width), dtype=np.int64)
    rows, columns, targets, ends = [], [], [], []
    for row, group in enumerate(batch):
        inputs[row, : len(group[0].ids) - 1] = group[0].ids[:-1]
        for request in group:
            scored = np.arange(request.start - 1, len(request.ids) - 1)
            rows.append(np.full(len(scored), row))
            columns.append(scored)
            targets.append(request.ids[request.start :])
            ends.append(len(scored))
    device = next(model.parameters()).device
    where = tuple(torch.from_numpy(np.concatenate(part)).to(device) for part in (rows, columns))
    wanted = torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(device)

    def read(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        at, found = hidden[where], []
        size = max(1, LOGITS_AT_ONCE // int(model.config.vocab_size))
        for part, ids in zip(at.split(size), wanted.split(size), strict=True):
            logits = model.logits(part)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chosen = logits.gather(-1, ids[:, None])[:, 0]
            found.append((chosen - logits.logsumexp(-1), logits.argmax(-1) == ids))
        log_probabilities, greedy = zip(*found, strict=True)
        return torch.cat(log_probabilities), torch.cat(greedy)

    with torch.no_grad():
        found, greedy = model(input_ids=torch.from_numpy(inputs).to(device), use_cache=False, objective=read)
    if not bool(torch.isfinite(found).all()):
        raise InputError(
            "the model's log-probabilities are not finite: its weights are damaged or its training diverged"
        )
    cuts = np.cumsum(ends)[:-1]
    pairs = zip(np.split(found.double().cpu().numpy(), cuts), np.split(greedy.cpu().numpy(), cuts), strict=True)
    return [Score(one, first) for one, first in pairs]
