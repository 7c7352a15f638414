"""One source cut into rows: row `j` from a position on -> where its tokens lie. Arithmetic over token and document
counts, no state.

`packed`: rows of T inputs at stride T over the whole stream, documents may cross. `within`: one row a document and
epoch, somewhere inside. `first-window`: the beginning of each document. In the last two, documents of T tokens or fewer
give no row. At the end: where the documents of a packed row end, and what that does to targets and positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from argonne.data.permutation import key_of, permute
from argonne.errors import InputError
from argonne.tokens.shards import TokenStream

# Constants of the family's own long-document loader: start = ((i + 1) * A + (epoch + 1) * B) mod 2^64 mod (length - T).
DOCUMENT_FACTOR = 0x9E3779B185EBCA87
EPOCH_FACTOR = 0xC2B2AE3D27D4EB4F
IGNORED = -100


@dataclass(frozen=True)
class Position:
    """Where a source stands: `used` of the current epoch, which is cut in rows of `piece` tokens.

    `used` counts tokens (packed) or places in the list of long enough documents (within, first-window).
    """

    epoch: int = 0
    piece: int = 0
    used: int = 0


@dataclass(frozen=True)
class RowKey:
    """What decides how a source is cut into rows and in which order they come."""

    sequence_length: int
    order: str
    documents: str
    seed: int


@dataclass
class Rows:
    """Where rows lie: the first token of each, or, for a row made of several runs, -1 and the runs as
    (start, length).
    """

    start: np.ndarray
    runs: dict[int, list[tuple[int, int]]]

    @staticmethod
    def empty(count: int) -> Rows:
        return Rows(np.zeros(count, dtype=np.int64), {})

    def put(self, where: np.ndarray, part: Rows) -> None:
        """Set the rows `where` to those of `part`."""
        self.start[where] = part.start
        for index, runs in part.runs.items():
            self.runs[int(where[index])] = runs


class SourceRows(Protocol):
    """What a mixture asks of a source; positions and rows mean what the source says they do."""

    def rows_left(self, key: RowKey, position: Position) -> int: ...
    def advance(self, key: RowKey, position: Position, rows: int) -> Position: ...
    def passes(self, key: RowKey, position: Position, rows: int) -> float: ...
    def locate(self, key: RowKey, position: Position, draws: np.ndarray) -> tuple[Rows, np.ndarray]: ...


class SourceWindows:
    """The rows of one source."""

    def __init__(self, name: str, fingerprint: str, stream: TokenStream) -> None:
        self.name, self.fingerprint, self.stream = name, fingerprint, stream
        self._lengths: np.ndarray | None = None
        self._long: dict[int, np.ndarray] = {}
        self._rest: dict[tuple[RowKey, Position], np.ndarray] = {}

    def epoch_rows(self, key: RowKey) -> int:
        """Rows of a whole epoch. Raises InputError when there is none."""
        length = key.sequence_length
        rows = (self.stream.tokens - 1) // length if key.documents == "packed" else len(self.long_documents(length))
        if rows < 1:
            longest = self.stream.tokens if key.documents == "packed" else int(self.lengths.max(initial=0))
            what = "it holds" if key.documents == "packed" else "its longest document holds"
            raise InputError(
                f"{self.name}: {what} {longest:,} tokens, data.sequence_length {length:,} needs at least "
                f"{length + 1:,}; use shorter rows or more text"
            )
        return rows

    def rows_left(self, key: RowKey, position: Position) -> int:
        """Rows from `position` to the end of its epoch."""
        if position.used == 0:
            return self.epoch_rows(key)
        if key.documents != "packed":
            same = position.piece == key.sequence_length
            return (
                len(self.long_documents(position.piece)) - position.used
                if same
                else len(self._documents_left(key, position))
            )
        return max(0, self._epoch_tokens(key, position.piece) - position.used) // key.sequence_length

    def advance(self, key: RowKey, position: Position, rows: int) -> Position:
        """Where the source stands after `rows` more rows."""
        if rows == 0:
            return position
        length = key.sequence_length
        piece = position.piece if position.used else length
        if self._inside_epoch(key, position, rows):
            return Position(position.epoch, piece, position.used + rows * length)
        left = self.rows_left(key, position)
        step = length if key.documents == "packed" else 1
        if rows <= left:
            if key.documents != "packed" and piece != length:
                return replace(position, used=int(self._documents_left(key, position)[rows - 1, 1]) + 1)
            return Position(position.epoch, piece, position.used + rows * step)
        epochs, inside = divmod(rows - left, self.epoch_rows(key))
        if inside == 0:
            return Position(position.epoch + epochs, length, self.epoch_rows(key) * step)
        return Position(position.epoch + 1 + epochs, length, inside * step)

    def passes(self, key: RowKey, position: Position, rows: int) -> float:
        """How often the source has been read after `rows` more rows."""
        after = self.advance(key, position, rows)
        if self.stream.growing:
            return after.epoch + min(1.0, after.used / max(1, self.stream.estimated_tokens))
        if after.used == 0:
            return float(after.epoch)
        if key.documents != "packed":
            return after.epoch + after.used / len(self.long_documents(after.piece))
        if self.rows_left(key, after) == 0:
            return float(after.epoch + 1)
        return after.epoch + after.used / self._epoch_tokens(key, after.piece)

    def locate(self, key: RowKey, position: Position, draws: np.ndarray) -> tuple[Rows, np.ndarray]:
        """(where the rows `draws` lie, the epoch of each). `draws` (int64, ascending) counts rows from
        `position` on.
        """
        if len(draws) and self._inside_epoch(key, position, int(draws[-1]) + 1):
            return Rows(position.used + draws * key.sequence_length, {}), np.full(
                len(draws), position.epoch, dtype=np.int64
            )
        left = self.rows_left(key, position)
        fresh = self.epoch_rows(key)
        beyond = draws - left
        epochs = np.where(beyond < 0, position.epoch, position.epoch + 1 + beyond // fresh)
        rows = Rows.empty(len(draws))
        for epoch in np.unique(epochs):
            mine = np.nonzero(epochs == epoch)[0]
            if epoch == position.epoch and position.used:
                part = self._rest_of_epoch(key, position, draws[mine])
            else:
                inside = draws[mine] if epoch == position.epoch else beyond[mine] % fresh
                part = self._whole_epoch(key, int(epoch), inside)
            rows.put(mine, part)
        return rows, epochs

    def _inside_epoch(self, key: RowKey, position: Position, rows: int) -> bool:
        """Do the next rows lie one after the other in what is left of the epoch? Known without the length of a set that
        is still growing.
        """
        if key.order != "sequential" or key.documents != "packed":
            return False
        return self.stream.reaches(position.used + rows * key.sequence_length + 1)

    def _whole_epoch(self, key: RowKey, epoch: int, inside: np.ndarray) -> Rows:
        count = self.epoch_rows(key)
        place = inside if key.order == "sequential" else permute(inside, count, self._order_key(key, epoch))
        if key.documents == "packed":
            return Rows(place * key.sequence_length, {})
        return self._in_documents(key, epoch, self.long_documents(key.sequence_length)[place])

    def _rest_of_epoch(self, key: RowKey, position: Position, draws: np.ndarray) -> Rows:
        length = key.sequence_length
        if key.documents != "packed" and position.piece != length:
            return self._in_documents(key, position.epoch, self._documents_left(key, position)[draws, 0])
        if key.documents != "packed":
            return self._whole_epoch(key, position.epoch, position.used + draws)
        begin = position.used + draws * length
        if key.order == "sequential":
            return Rows(begin, {})
        count = (self.stream.tokens - 1) // position.piece
        order = self._order_key(key, position.epoch)
        if position.piece == length and position.used % length == 0:
            return Rows(permute(begin // length, count, order) * length, {})
        rows = Rows(np.full(len(draws), -1, dtype=np.int64), {})
        for index, first in enumerate(begin.tolist()):
            rows.runs[index] = list(self._runs(first, length, position.piece, count, order))
        return rows

    @staticmethod
    def _runs(first: int, length: int, piece: int, count: int, order: int) -> Iterator[tuple[int, int]]:
        """A row of `length` that runs over an epoch shuffled in windows of `piece` tokens."""
        numbers = np.arange(first // piece, (first + length - 1) // piece + 1)
        for number, window in zip(numbers.tolist(), permute(numbers, count, order).tolist(), strict=True):
            low, high = max(first, number * piece), min(first + length, (number + 1) * piece)
            yield window * piece + low - number * piece, high - low

    def _epoch_tokens(self, key: RowKey, piece: int) -> int:
        whole = self.stream.tokens - 1
        return whole if key.order == "sequential" else whole // piece * piece

    def _order_key(self, key: RowKey, epoch: int) -> int:
        return key_of("order", key.seed, self.fingerprint, epoch)

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) tokens of each document."""
        if self._lengths is None:
            self._lengths = np.diff(self.stream.document_ends, prepend=0)
        return self._lengths

    def long_documents(self, length: int) -> np.ndarray:
        """Numbers of the documents that hold a row of `length` inputs and its targets."""
        if length not in self._long:
            self._long[length] = np.nonzero(self.lengths > length)[0]
        return self._long[length]

    def short_documents(self, length: int) -> int:
        """How many documents give no row of `length`."""
        return len(self.lengths) - len(self.long_documents(length))

    def _documents_left(self, key: RowKey, position: Position) -> np.ndarray:
        """(rows, 2): document number and place in the epoch's list, for what is left of an epoch begun with rows of
        `position.piece`.
        """
        found = self._rest.get((key, position))
        if found is None:
            listed = self.long_documents(position.piece)
            places = np.arange(position.used, len(listed))
            ordered = listed[
                places
                if key.order == "sequential"
                else permute(places, len(listed), self._order_key(key, position.epoch))
            ]
            fits = self.lengths[ordered] > key.sequence_length
            found = self._rest[(key, position)] = np.stack([ordered[fits], places[fits]], axis=1)
        return found

    def _in_documents(self, key: RowKey, epoch: int, numbers: np.ndarray) -> Rows:
        begins = self.stream.document_ends[numbers] - self.lengths[numbers]
        if key.documents == "first-window":
            return Rows(begins, {})
        spread = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(DOCUMENT_FACTOR) + np.uint64(
            (epoch + 1) * EPOCH_FACTOR % 2**64
        )
        room = (self.lengths[numbers] - key.sequence_length).astype(np.uint64)
        return Rows(begins + (spread % room).astype(np.int64), {})


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


def ends_in_row(
    stream: TokenStream, runs: Sequence[tuple[int, int]], inputs: np.ndarray, eos_id: int | None
) -> np.ndarray:
    """Places in a row made of `runs` (start, length) of the stream just after each document; by `eos_id` where the
    stream keeps no ends.
    """
    if not stream.has_documents:
        return np.nonzero(inputs == eos_id)[0] + 1
    found, filled = [], 0
    for begin, size in runs:
        found.append(stream.ends_between(begin, begin + size) - begin + filled)
        filled += size
    return np.concatenate(found)
