"""Faults planted inside a victim, on one rank of several. Each is a function called in the victim before it trains."""

from __future__ import annotations

import errno
import os
import threading
from typing import Any

MICRO_BATCHES = 1  # a step of the nano recipe on two ranks: 8 rows, 4 a rank, 4 a micro-batch


def _is(rank: int) -> bool:
    return int(os.environ.get("RANK", "0")) == rank


def _before_step(wanted: int, plant: Any) -> None:
    """Call `plant(model)` before step `wanted` (from 1) of this session."""
    from argonne.train import step

    plain, calls = step.next_token, [0]

    def objective(model: Any, micro: Any) -> step.Loss:
        calls[0] += 1
        if calls[0] == (wanted - 1) * MICRO_BATCHES + 1:
            plant(model)
        return plain(model, micro)

    step.next_token = objective


def nan_weight_on_rank_1() -> None:
    """After step 3 one weight of one rank is lost, as by a bit flip in its memory: nobody's gradient sees it before the next save."""

    def spoil(model: Any) -> None:
        import torch

        if _is(1):
            with torch.no_grad():
                model.module.model.embed_tokens.weight[-1, 0] = float("nan")

    _before_step(4, spoil)


def full_disk_on_rank_1() -> None:
    """The tensors of step 8 cannot be written by the second rank."""
    if _is(1):
        from torch.distributed.checkpoint import HuggingFaceStorageWriter

        plain_write = HuggingFaceStorageWriter.write_data

        def write_data(self: Any, *arguments: Any, **named: Any) -> Any:
            if "_8" in str(self.path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return plain_write(self, *arguments, **named)

        HuggingFaceStorageWriter.write_data = write_data


def failing_sample() -> None:
    from argonne.serve import engine

    def fail(*arguments: Any, **named: Any) -> str:
        raise ValueError("planted")

    engine.sample_text = fail


def hanging_sample() -> None:
    from argonne.serve import engine

    engine.sample_text = lambda *arguments, **named: threading.Event().wait() and ""
