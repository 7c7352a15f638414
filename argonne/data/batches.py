"""Rows of tokens as arrays and tensors: inputs, targets one further, and, with a document mask, positions that restart with each
document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from argonne.data.mixture import GlobalRows
from argonne.tokens.shards import TokenStream

if TYPE_CHECKING:
    import torch

IGNORED = -100
FILLER_SOURCE = -1


@dataclass
class Arrays:
    """`inputs` and `labels` (rows, T) int64; `positions` (rows, T) int64 or None; `sources` (rows,) int64."""

    inputs: np.ndarray
    labels: np.ndarray
    positions: np.ndarray | None
    sources: np.ndarray

    @property
    def valid_tokens(self) -> int:
        """Targets that are trained on."""
        if self.positions is None:
            return sum(source >= 0 for source in self.sources.tolist()) * self.labels.shape[1]
        return int(np.count_nonzero(self.labels != IGNORED))

    def rows(self, first: int, count: int, rows: int) -> Arrays:
        """Rows first .. first+count-1, filled up to `rows`."""
        length = self.inputs.shape[1]
        part = Arrays(np.empty((rows, length), np.int64), np.empty((rows, length), np.int64), None, np.full(rows, FILLER_SOURCE, np.int64))
        part.inputs[:count] = self.inputs[first : first + count]
        part.labels[:count] = self.labels[first : first + count]
        part.sources[:count] = self.sources[first : first + count]
        if self.positions is not None:
            part.positions = np.empty((rows, length), np.int64)
            part.positions[:count] = self.positions[first : first + count]
        _fill(part.inputs[count:], part.labels[count:], None if part.positions is None else part.positions[count:])
        return part


def mask_documents(ends: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> None:
    """Cut one row at document ends, in place. `ends` (in 1 .. T): the places just after each document's last token.

    The last token of a document predicts nothing; the positions of what follows begin at 0.
    """
    length = len(positions)
    positions[:] = np.arange(length)
    labels[ends - 1] = IGNORED
    for end in ends.tolist():
        if end < length:
            positions[end:] = np.arange(length - end)


def assemble(streams: list[TokenStream], found: GlobalRows, length: int, mask: bool, eos_id: int | None, rows: int) -> Arrays:
    """The rows `found`, read and filled up to `rows` with rows that train nothing."""
    count = len(found.source)
    inputs = np.empty((rows, length), dtype=np.int64)
    labels = np.empty((rows, length), dtype=np.int64)
    positions = np.empty((rows, length), dtype=np.int64) if mask else None
    sources = np.full(rows, FILLER_SOURCE, dtype=np.int64)
    sources[:count] = found.source
    starts = found.rows.start.tolist()
    for row, (start, source) in enumerate(zip(starts, sources[:count].tolist(), strict=True)):
        stream = streams[source]
        runs = [(start, length)] if start >= 0 else found.rows.runs[row]
        filled = 0
        for begin, size in runs:
            stream.copy_shifted(begin, inputs[row, filled : filled + size], labels[row, filled : filled + size])
            filled += size
        if positions is not None:
            mask_documents(_ends(stream, runs, inputs[row], eos_id), labels[row], positions[row])
    _fill(inputs[count:], labels[count:], None if positions is None else positions[count:])
    return Arrays(inputs, labels, positions, sources)


def _fill(inputs: np.ndarray, labels: np.ndarray, positions: np.ndarray | None) -> None:
    """Rows that train nothing."""
    inputs[:] = 0
    labels[:] = IGNORED
    if positions is not None:
        positions[:] = np.arange(positions.shape[1])


def _ends(stream: TokenStream, runs: list[tuple[int, int]], inputs: np.ndarray, eos_id: int | None) -> np.ndarray:
    if not stream.has_documents:
        return np.nonzero(inputs == eos_id)[0] + 1
    found, filled = [], 0
    for begin, size in runs:
        found.append(stream.ends_between(begin, begin + size) - begin + filled)
        filled += size
    return np.concatenate(found)


def to_tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    """The keys the model takes: input_ids, shift_labels and, with a document mask, position_ids."""
    import torch

    tensors = {"input_ids": torch.from_numpy(arrays.inputs), "shift_labels": torch.from_numpy(arrays.labels)}
    if arrays.positions is not None:
        tensors["position_ids"] = torch.from_numpy(arrays.positions)
    return tensors
