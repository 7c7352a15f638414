"""Requests to log-probabilities: batches of like length, nothing cached, nothing random."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from argonne.errors import InputError
from argonne.evaluate.requests import Score, ScoreRequest

IGNORED = -100
LOGITS_A_BATCH = 1 << 27


def scoring(
    model: Any,
    requests: Sequence[ScoreRequest],
    *,
    tokens_a_batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[None, None, list[Score]]:
    """Answers to every request, in the order given, as work that yields after every batch. The model's mode is put back
    after.

    `tokens_a_batch`: by default at most 4,096, and fewer where the vocabulary is so large that the logits would not fit
    into half a GB. `progress` is called with (requests done, requests in all). Raises InputError where a request is
    longer than the model's context plus one, or the model's log-probabilities are not finite.
    """
    longest = int(model.config.max_position_embeddings)
    for request in requests:
        if not 1 <= request.start < len(request.ids) <= longest + 1:
            raise InputError(
                f"request: {len(request.ids):,} ids scored from {request.start}, expected 1 <= start < ids <= context "
                f"{longest:,} + 1"
            )
    tokens_a_batch = tokens_a_batch or min(4096, LOGITS_A_BATCH // int(model.config.vocab_size))
    answers: dict[int, Score] = {}
    training = model.training
    model.eval()
    try:
        for batch in _batches(requests, tokens_a_batch):
            answers.update(zip(batch, _score_batch(model, [requests[number] for number in batch]), strict=True))
            yield
            if progress is not None:
                progress(len(answers), len(requests))
    finally:
        model.train(training)
    return [answers[number] for number in range(len(requests))]


def _batches(requests: Sequence[ScoreRequest], tokens_a_batch: int) -> Iterator[list[int]]:
    """Numbers of requests, longest first, so that padding is small and the largest batch comes first."""
    batch: list[int] = []
    for number in sorted(range(len(requests)), key=lambda number: -len(requests[number].ids)):
        if batch and (len(batch) + 1) * (len(requests[batch[0]].ids) - 1) > tokens_a_batch:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _score_batch(model: Any, batch: Sequence[ScoreRequest]) -> list[Score]:
    """Inputs are ids[:-1], targets ids[1:]; padding is on the right, where causal attention never sees it."""
    width = max(len(request.ids) for request in batch) - 1
    inputs = np.zeros((len(batch), width), dtype=np.int64)
    targets = np.full((len(batch), width), IGNORED, dtype=np.int64)
    for row, request in enumerate(batch):
        size = len(request.ids) - 1
        inputs[row, :size] = request.ids[:-1]
        targets[row, request.start - 1 : size] = request.ids[request.start :]
    device = next(model.parameters()).device
    labels = torch.from_numpy(targets).to(device)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(inputs).to(device), use_cache=False).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wanted = logits.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
        found = (wanted - logits.logsumexp(dim=-1)).double().cpu().numpy()
        greedy = (logits.argmax(dim=-1) == labels).cpu().numpy()
    answers = []
    for row, request in enumerate(batch):
        span = slice(request.start - 1, len(request.ids) - 1)
        if not np.isfinite(found[row, span]).all():
            raise InputError(
                "the model's log-probabilities are not finite: its weights are damaged or its training diverged"
            )
        answers.append(Score(found[row, span], greedy[row, span]))
    return answers
