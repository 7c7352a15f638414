"""Step -> this rank's tensors. Any step can be asked for; steps in order are read ahead by a thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch

from argonne.data.batches import FILLER_SOURCE, IGNORED, Arrays, assemble, to_tensors
from argonne.data.mixture import GlobalRows, Phase
from argonne.data.training_data import TrainingData, open_training_data
from argonne.errors import InputError

if TYPE_CHECKING:
    from types import TracebackType

# Rows located at once: the arithmetic is vectorised, and one row at a time would cost as much as reading it.
BLOCK = 4096


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch. Every rank has the same number of micro-batches; rows that fill up train nothing."""

    step: int
    micro_batches: list[dict[str, torch.Tensor]]
    valid_tokens: int
    tokens: int
    sources: list[torch.Tensor]
    waited_seconds: float


def share_of(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first row, rows) of a rank: rows are dealt in order, the first ranks have one more where it does not divide."""
    each, more = divmod(rows, world_size)
    return rank * each + min(rank, more), each + (rank < more)


class Loader:
    """The batches of one rank. `batch(step)` depends on nothing but the step and the rank's place."""

    def __init__(
        self,
        data: TrainingData,
        rank: int,
        world_size: int,
        micro_rows: int,
        *,
        prefetch: int = 2,
        pin_memory: bool = False,
        broadcast: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise InputError(f"loader: rank {rank} of {world_size}, expected 0 to {world_size - 1}")
        if data.data.reader == "rank-0" and world_size > 1 and broadcast is None:
            raise InputError('data.reader = "rank-0" needs a broadcast between the ranks; use "every-rank" here')
        self.data, self.rank, self.world_size = data, rank, world_size
        self.prefetch, self.pin_memory = prefetch, pin_memory
        self.broadcast = broadcast if data.data.reader == "rank-0" and world_size > 1 else None
        self.set_micro_rows(micro_rows)
        self._streams = [data.streams[fingerprint] for fingerprint in (source.tokens.fingerprint for source in data.sources)]
        self._numbers = {source.tokens.fingerprint: number for number, source in enumerate(data.sources)}
        self._blocks: dict[tuple[int, int], GlobalRows] = {}
        self._lock = Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future[Arrays]] = {}
        self.verification = data.verify() if rank == 0 else None

    def set_micro_rows(self, rows: int) -> None:
        """Cut the rank's rows into micro-batches of `rows` from the next `batch` on. The rows themselves stay the same."""
        if rows < 1:
            raise InputError(f"batch.micro: found {rows}, expected at least 1 row")
        self.micro_rows = rows

    def batch(self, step: int) -> Batch:
        """This rank's micro-batches of `step`. Raises InputError where a source is used up."""
        began = time.perf_counter()
        if self.verification is not None:
            self.verification.raise_problem()
        future = self._ahead.pop(step, None)
        arrays = future.result() if future is not None else self._read(step)
        if self.broadcast is not None:
            arrays = self._from_rank_0(arrays)
        waited = time.perf_counter() - began
        self._read_ahead(step)
        return self._cut(step, arrays, waited)

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
        phase = self.data.mixture.phase_at(step)
        first = self.data.mixture.samples_before(step)
        if self.broadcast is not None:
            return self._for_broadcast(phase, first)
        self.data.mixture.check_rows(phase, first + phase.rows)
        mine, count = share_of(phase.rows, self.rank, self.world_size)
        return self._pinned(self._rows(phase, first + mine, count, -(-phase.rows // self.world_size)))

    def _for_broadcast(self, phase: Phase, first: int) -> Arrays:
        """The whole global batch on rank 0; room for it on the others."""
        if self.rank == 0:
            self.data.mixture.check_rows(phase, first + phase.rows)
            return self._rows(phase, first, phase.rows, phase.rows)
        shape = (phase.rows, phase.sequence_length)
        positions = np.empty(shape, np.int64) if phase.document_mask else None
        return Arrays(np.empty(shape, np.int64), np.empty(shape, np.int64), positions, np.empty(phase.rows, np.int64))

    def _from_rank_0(self, arrays: Arrays) -> Arrays:
        assert self.broadcast is not None
        parts = [arrays.inputs, arrays.labels, arrays.sources] + ([] if arrays.positions is None else [arrays.positions])
        for part in parts:
            self.broadcast(torch.from_numpy(part))
        rows = len(arrays.sources)
        first, count = share_of(rows, self.rank, self.world_size)
        return self._pinned(arrays.rows(first, count, -(-rows // self.world_size)))

    def _pinned(self, arrays: Arrays) -> Arrays:
        if self.pin_memory:
            for name in ("inputs", "labels", "positions"):
                if (array := getattr(arrays, name)) is not None:
                    setattr(arrays, name, torch.from_numpy(array).pin_memory().numpy())
        return arrays

    def _rows(self, phase: Phase, first: int, count: int, rows: int) -> Arrays:
        """Samples first .. first+count-1, filled up to `rows`."""
        found = self._located(phase, first, count)
        arrays = assemble(self._streams, found, phase.sequence_length, phase.document_mask, self.data.eos_id, rows)
        if arrays.inputs.max(initial=0) >= self.data.vocab_size:
            self._name_foreign_id(arrays)
        return arrays

    def _name_foreign_id(self, arrays: Arrays) -> None:
        row = int((arrays.inputs >= self.data.vocab_size).any(axis=1).argmax())
        source = self.data.sources[int(arrays.sources[row])]
        raise InputError(
            f"{source.tokens.path}: holds id {int(arrays.inputs[row].max()):,}, the tokenizer {self.data.tokenizer_folder} has "
            f"{self.data.vocab_size:,} entries; set data.tokenizer to the one that made these tokens"
        )

    def _located(self, phase: Phase, first: int, count: int) -> GlobalRows:
        """The rows of a run of samples, cut out of blocks that are located once."""
        if any(stream.growing for stream in self._streams):
            return self._numbered(phase, self.data.mixture.locate(phase, first, first + count))
        parts: list[GlobalRows] = []
        while count:
            number = (first - phase.first_sample) // BLOCK
            inside = first - phase.first_sample - number * BLOCK
            here = min(count, BLOCK - inside)
            parts.append(self._block(phase, number).part(inside, inside + here))
            first, count = first + here, count - here
        return GlobalRows.joined(parts)

    def _block(self, phase: Phase, number: int) -> GlobalRows:
        key = (phase.first_step, number)
        with self._lock:
            if key not in self._blocks:
                begin = phase.first_sample + number * BLOCK
                found = self._numbered(phase, self.data.mixture.locate(phase, begin, begin + BLOCK))
                self._blocks = {**dict(list(self._blocks.items())[-2:]), key: found}
            return self._blocks[key]

    def _numbered(self, phase: Phase, found: GlobalRows) -> GlobalRows:
        """The same rows with the numbers that the sources have in the recipe."""
        return GlobalRows(self._source_numbers(phase)[found.source], found.rows, found.epoch)

    def _source_numbers(self, phase: Phase) -> np.ndarray:
        """Place in `data.sources` of each source of the phase."""
        return np.array([self._numbers[source.fingerprint] for source in phase.sources])

    def close(self) -> None:
        """End the reading thread, also where it waits for text that is still being tokenised."""
        if self._thread is not None:
            with ExitStack() as ending:
                for stream in self._streams:
                    ending.enter_context(stream.not_waiting())
                self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        self._ahead.clear()
        if self.verification is not None:
            self.verification.close()
            self.verification.raise_problem()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _cut(self, step: int, arrays: Arrays, waited: float) -> Batch:
        tensors = to_tensors(arrays)
        sources = torch.from_numpy(arrays.sources)
        rows, size = arrays.sources.size, self.micro_rows
        tokens = self.data.rows(step) * self.data.sequence_length(step)
        if rows == size:
            return Batch(step, [tensors], arrays.valid_tokens, tokens, [sources], waited)
        if missing := -rows % size:
            tensors = {name: torch.cat([tensor, _filler(name, tensor, missing)]) for name, tensor in tensors.items()}
            sources = torch.cat([sources, sources.new_full((missing,), FILLER_SOURCE)])
        starts = range(0, rows, size)
        micro_batches = [{name: tensor[start : start + size] for name, tensor in tensors.items()} for start in starts]
        return Batch(step, micro_batches, arrays.valid_tokens, tokens, [sources[start : start + size] for start in starts], waited)


def _filler(name: str, tensor: torch.Tensor, rows: int) -> torch.Tensor:
    if name == "position_ids":
        return torch.arange(tensor.shape[1]).expand(rows, -1)
    return tensor.new_full((rows, tensor.shape[1]), IGNORED if name == "shift_labels" else 0)


__all__ = ["Batch", "Loader", "TrainingData", "open_training_data", "share_of"]
