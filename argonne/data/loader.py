"""Step -> this rank's tensors, for windows, conversations and pairs alike. Any step can be asked for; steps in order
are read ahead.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from argonne.errors import InputError


@dataclass(frozen=True)
class Array:
    """One array of a batch, rows first. `fill`: what a row that only fills up holds, a number or an array of a row's
    shape.
    """

    values: np.ndarray
    fill: int | float | np.ndarray

    def cut(self, first: int, count: int, rows: int) -> Array:
        """Rows first .. first + count - 1, filled up to `rows`."""
        part = np.empty((rows, *self.values.shape[1:]), self.values.dtype)
        part[:count] = self.values[first : first + count]
        part[count:] = self.fill
        return Array(part, self.fill)


Arrays = Mapping[str, Array]


class Rows(Protocol):
    """What the loader asks of data. A global batch is rows that lie whole in one place: what must stay together (a
    pair) is one row.

    read(step, first, count, rows): rows first .. first + count - 1 of the global batch of `step`, filled up to `rows`.
    One of the arrays is named `unit` and holds what each row adds to the divisor of the loss (0 where it only fills
    up). check: raise what was found wrong in the background. not_waiting: inside, whoever waits for data that is not
    there yet gets an error.
    """

    unit: str
    reads_model: bool

    def rows(self, step: int) -> int: ...
    def read(self, step: int, first: int, count: int, rows: int) -> Arrays: ...
    def check(self) -> None: ...
    def not_waiting(self) -> AbstractContextManager[Any]: ...


class Exchange(Protocol):
    """How rank 0 hands what it has read to the other ranks."""

    @property
    def is_main(self) -> bool: ...
    def broadcast(self, value: Any) -> Any: ...
    def broadcast_tensor(self, tensor: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch. Every rank has the same number of micro-batches; rows that fill up train
    nothing.
    """

    step: int
    micro_batches: Sequence[Mapping[str, torch.Tensor]]
    count: int
    waited_seconds: float


def share_of(rows: int, rank: int, size: int) -> tuple[int, int]:
    """(first row, rows) of a rank: rows are dealt in order, the first ranks have one more where it does not divide."""
    each, more = divmod(rows, size)
    return rank * each + min(rank, more), each + (rank < more)


class Loader(AbstractContextManager["Loader"]):
    """The batches of one rank. `batch(step)` depends on nothing but the step and the rank's place."""

    def __init__(
        self,
        data: Rows,
        rank: int,
        size: int,
        micro_rows: int,
        *,
        prefetch: int = 2,
        pin_memory: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        """rank, size: the place among the parts in which rows are dealt. exchange: rank 0 alone reads, and hands the
        rows to all.
        """
        if not 0 <= rank < size:
            raise InputError(f"loader: rank {rank} of {size}, expected 0 to {size - 1}")
        self.data, self.rank, self.size = data, rank, size
        self.prefetch, self.pin_memory, self.exchange = 0 if data.reads_model else prefetch, pin_memory, exchange
        self.set_micro_rows(micro_rows)
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future[Arrays]] = {}

    @property
    def reads_alone(self) -> bool:
        """Does no rank wait for another while this one reads?"""
        return self.exchange is None and not self.data.reads_model

    def set_micro_rows(self, rows: int) -> None:
        """Cut the rank's rows into micro-batches of `rows` from the next `batch` on. The rows
        themselves stay the same.
        """
        if rows < 1:
            raise InputError(f"batch.micro: found {rows}, expected at least 1 row")
        self.micro_rows = rows

    def batch(self, step: int) -> Batch:
        """This rank's micro-batches of `step`. Raises InputError where a source is used up, or was found damaged."""
        began = time.perf_counter()
        arrays = self._here(step) if self.exchange is None else self._from_rank_0(step, self.exchange)
        waited = time.perf_counter() - began
        self._read_ahead(step)
        count = int(arrays[self.data.unit].values.sum())
        return Batch(step, self._micro_batches(arrays), count, waited)

    def wrong(self) -> InputError | None:
        """What was found wrong in the background, if anything was."""
        try:
            self.data.check()
        except InputError as error:
            return error
        return None

    def _read_ahead(self, step: int) -> None:
        wanted = range(step + 1, step + 1 + self.prefetch)
        for old in [number for number in self._ahead if number not in wanted]:
            self._ahead.pop(old).cancel()
        if self.prefetch and self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="argonne-data")
        for number in wanted:
            if number not in self._ahead and self._thread is not None:
                self._ahead[number] = self._thread.submit(self._read, number)

    def _read(self, step: int) -> Arrays:
        rows = self.data.rows(step)
        if self.exchange is not None:
            return self.data.read(step, 0, rows, rows) if self.exchange.is_main else {}
        first, count = share_of(rows, self.rank, self.size)
        return self._pinned(self.data.read(step, first, count, -(-rows // self.size)))

    def _here(self, step: int) -> Arrays:
        """What this rank has read of `step`, perhaps ahead."""
        self.data.check()
        future = self._ahead.pop(step, None)
        return future.result() if future is not None else self._read(step)

    def _from_rank_0(self, step: int, exchange: Exchange) -> Arrays:
        """This rank's share of what rank 0 has read: names, shapes, types and fill values first, then the values. What
        rank 0 finds wrong with the input, all do.
        """
        arrays: Arrays = {}
        told: InputError | list[tuple[str, tuple[int, ...], str, Any]]
        try:
            arrays = self._here(step)
            told = [(name, array.values.shape, array.values.dtype.str, array.fill) for name, array in arrays.items()]
        except InputError as error:
            told = error
        if isinstance(told := exchange.broadcast(told), InputError):
            raise told
        whole = {}
        for name, shape, dtype, fill in told:
            values = arrays[name].values if exchange.is_main else np.empty(shape, dtype)
            exchange.broadcast_tensor(torch.from_numpy(values))
            whole[name] = Array(values, fill)
        rows = len(next(iter(whole.values())).values)
        first, count = share_of(rows, self.rank, self.size)
        return self._pinned({name: array.cut(first, count, -(-rows // self.size)) for name, array in whole.items()})

    def _pinned(self, arrays: Arrays) -> Arrays:
        if not self.pin_memory:
            return arrays
        return {
            name: Array(torch.from_numpy(array.values).pin_memory().numpy(), array.fill)
            for name, array in arrays.items()
        }

    def _micro_batches(self, arrays: Arrays) -> list[dict[str, torch.Tensor]]:
        size = self.micro_rows
        rows = len(arrays[self.data.unit].values)
        if missing := -rows % size:
            arrays = {name: array.cut(0, rows, rows + missing) for name, array in arrays.items()}
        tensors = {name: torch.from_numpy(array.values) for name, array in arrays.items()}
        return [
            {name: tensor[start : start + size] for name, tensor in tensors.items()} for start in range(0, rows, size)
        ]

    def close(self) -> None:
        """End the reading thread, also where it waits for text that is still being tokenised."""
        if self._thread is not None:
            with self.data.not_waiting():
                self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        self._ahead.clear()

    def __exit__(self, *raised: object) -> None:
        self.close()
