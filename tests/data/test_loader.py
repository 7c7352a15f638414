"""The same global batches on any layout: ranks, micro-batches, prefetch, and one reader for all."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from argonne.config import BatchSection
from argonne.data.dataset import open_training_data
from argonne.data.loader import Loader
from tests.data.rows import SLOW, global_rows, section


class Wire:
    """What rank 0 sent, for the other ranks to receive one after the other."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def end(self, rank: int) -> End:
        return End(rank == 0, self.sent, iter(list(self.sent)))


@dataclass
class End:
    """One rank's end of the wire."""

    is_main: bool
    sent: list[Any]
    received: Iterator[Any]

    def broadcast(self, value: Any) -> Any:
        if not self.is_main:
            return next(self.received)
        self.sent.append(value)
        return value

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        if self.is_main:
            self.sent.append(tensor.clone())
        else:
            tensor.copy_(next(self.received))


@SLOW
@given(world=st.integers(1, 7), micro=st.integers(1, 6), prefetch=st.integers(0, 3), rows=st.integers(1, 11))
def test_the_global_batch_does_not_depend_on_ranks_micro_batch_or_prefetch(
    write_tokens: Callable[..., Path], world: int, micro: int, prefetch: int, rows: int
) -> None:
    first, second = write_tokens("a", [90, 33]), write_tokens("b", [70], offset=1000)
    chosen = section(first, second, weights=(2.0, 1.0), order="shuffled")
    data = open_training_data(chosen, BatchSection(tokens_per_step=rows * 8), 3)
    alone, spread = global_rows(data, range(4)), global_rows(data, range(4), world, micro, prefetch)
    for one, many in zip(alone, spread, strict=True):
        assert np.array_equal(one, many)


def test_the_valid_tokens_of_all_ranks_add_up_to_the_batch(write_tokens: Callable[..., Path]) -> None:
    data = open_training_data(section(write_tokens("a", [200])), BatchSection(tokens_per_step=5 * 8), 3)
    batches = [Loader(data, rank, 4, 2).batch(0) for rank in range(4)]
    assert [batch.count for batch in batches] == [16, 8, 8, 8]


def test_the_reader_on_rank_0_gives_the_same_batches(write_tokens: Callable[..., Path]) -> None:
    folders = (
        write_tokens("a", [5, 11, 6, 3, 40, 7, 12, 58, 9, 4, 145, 100]),
        write_tokens("b", [50, 13, 11], offset=1000),
    )
    batch = BatchSection(tokens_per_step=7 * 8)
    plain = open_training_data(section(*folders, order="shuffled", document_mask=True), batch, 3)
    reading = open_training_data(section(*folders, order="shuffled", document_mask=True, reader="rank-0"), batch, 3)
    wire = Wire()
    for rank in range(3):
        with Loader(plain, rank, 3, 2) as expected, Loader(reading, rank, 3, 2, exchange=wire.end(rank)) as loader:
            for step in range(3):
                one, other = expected.batch(step), loader.batch(step)
                assert one.count == other.count
                for left, right in zip(one.micro_batches, other.micro_batches, strict=True):
                    assert all((left[name] == right[name]).all() for name in left)


def test_under_rank_0_the_other_ranks_need_no_files(write_tokens: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_tokens("a", [300, 100])
    section_0 = section(folder, order="shuffled", reader="rank-0")
    reading = open_training_data(section_0, BatchSection(tokens_per_step=6 * 8), 3)
    copy = pickle.dumps(reading)
    wire = Wire()
    with Loader(reading, 0, 2, 2, exchange=wire.end(0)) as loader:
        first = [loader.batch(step) for step in range(3)]
    folder.rename(tmp_path / "gone")
    with Loader(pickle.loads(copy), 1, 2, 2, exchange=wire.end(1)) as loader:
        second = [loader.batch(step) for step in range(3)]
    (tmp_path / "gone").rename(folder)
    alone = open_training_data(section(folder, order="shuffled"), BatchSection(tokens_per_step=6 * 8), 3)
    for step, expected in enumerate(global_rows(alone, range(3))):
        rows = [part["input_ids"] for batch in (first[step], second[step]) for part in batch.micro_batches]
        valid = [
            part["shift_labels"][:, 0] >= 0 for batch in (first[step], second[step]) for part in batch.micro_batches
        ]
        found = np.concatenate([part[keep].numpy() for part, keep in zip(rows, valid, strict=True)])
        assert np.array_equal(found, expected[:, :8])


def test_micro_rows_can_change_between_steps_without_changing_the_rows(write_tokens: Callable[..., Path]) -> None:
    data = open_training_data(section(write_tokens("a", [300])), BatchSection(tokens_per_step=4 * 8), 3)
    with Loader(data, 0, 1, 4) as loader:
        loader.batch(0)
        loader.set_micro_rows(1)
        batch = loader.batch(1)
    assert [part["input_ids"].tolist() for part in batch.micro_batches] == [
        [list(range(first, first + 8))] for first in (32, 40, 48, 56)
    ]
