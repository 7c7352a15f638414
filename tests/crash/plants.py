"""Faults planted inside a victim, on one rank of several. Each is a function called in the victim before it trains."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

SCORING = "the reference scores a batch"
MICRO_BATCHES = 1  # a step of the nano recipe on two ranks: 8 rows, 4 a rank, 4 a micro-batch


def _is(rank: int) -> bool:
    return int(os.environ.get("RANK", "0")) == rank


def _before_step(wanted: int, plant: Any) -> None:
    """Call `plant(head)` before step `wanted` (from 1) of this session."""
    from argonne.stages import pretrain

    plain, calls = pretrain.next_token, [0]

    def objective(head: Any, hidden: Any, micro: Any) -> Any:
        calls[0] += 1
        if calls[0] == (wanted - 1) * MICRO_BATCHES + 1:
            plant(head)
        return plain(head, hidden, micro)

    pretrain.next_token = objective


def nan_weight_on_rank_1() -> None:
    """After step 3 one weight of one rank is lost, as by a bit flip in its memory: nobody's gradient sees it before the
    next save.
    """

    def spoil(head: Any) -> None:
        import torch

        if _is(1):
            with torch.no_grad():
                head.weight[-1, 0] = float("nan")

    _before_step(4, spoil)


def full_disk_on_rank_1() -> None:
    """The tensors of step 8 cannot be written by the second rank."""
    if _is(1):
        from argonne.train.tensor_files import HashingWriter

        plain_write = HashingWriter.write_data

        def write_data(self: Any, *arguments: Any, **named: Any) -> Any:
            if "_8" in str(self.path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return plain_write(self, *arguments, **named)

        HashingWriter.write_data = write_data


def failing_sample() -> None:
    from argonne.stages import hooks

    def fail(*arguments: Any, **named: Any) -> str:
        raise ValueError("planted")

    hooks.stream_text = fail


def hanging_sample() -> None:
    from argonne.stages import hooks

    hooks.stream_text = lambda *arguments, **named: threading.Event().wait() and ""


def no_links() -> None:
    """A file system that knows neither kind of link."""

    def refused(*arguments: Any, **named: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    os.symlink = os.link = refused  # type: ignore[assignment]


def full_disk_once_at_step_8() -> None:
    from argonne.train import checkpoint

    plain, fails = checkpoint.save_checkpoint, [8]

    def save(run: Any, step: int, *rest: Any, **named: Any) -> None:
        if step in fails:
            fails.remove(step)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(run, step, *rest, **named)

    checkpoint.save_checkpoint = save


def small_units_and_blocks() -> None:
    """A small file of conversations is rendered in many units and packed in many blocks, as a large one is."""
    from argonne.data import packing
    from argonne.prepare import documents

    documents.unit_bytes = lambda files: 700
    packing.BLOCK = 16


def small_units_blocks_and_passes() -> None:
    """As `small_units_and_blocks`, smaller since pairs are short; and the reference scores one row at a time, and tells
    the log when it begins one.
    """
    from argonne.data import pair_data
    from argonne.prepare import documents
    from argonne.stages import dpo

    small_units_and_blocks()
    documents.unit_bytes = lambda files: 300
    pair_data.TOKENS_A_PASS = 1
    plain = dpo.scores

    def scores(*arguments: Any) -> Any:
        print(SCORING, file=sys.stderr, flush=True)
        return plain(*arguments)

    dpo.scores = scores


def record_batches(folder: Path) -> None:
    """Every batch that is trained leaves its rows, those that only fill up left out, in `folder`: a file a step, number
    of ranks and rank.
    """
    from argonne.data.loader import Batch, Loader

    plain = Loader.batch

    def batch(self: Loader, step: int) -> Batch:
        found = plain(self, step)
        names = found.micro_batches[0]
        arrays = {name: np.concatenate([micro[name].numpy() for micro in found.micro_batches]) for name in names}
        file = folder / f"{step}-{self.size}-{self.rank}.npz"
        temporary = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **{name: values[arrays["source"] >= 0] for name, values in arrays.items()})
        temporary.replace(file)
        return found

    Loader.batch = batch
