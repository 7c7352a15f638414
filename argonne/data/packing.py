"""Conversations packed into rows: best fit, in blocks of shuffled conversations.

An epoch is a keyed permutation of the conversations, cut into blocks of 65,536. Each block is packed alone and its rows
are shuffled, so that no part of an epoch has all the long ones: a pure function of (lengths, seed, epoch, block, row
length), kept on disk under the fingerprint of these. Row numbers are arithmetic over the rows of the blocks before.
Memory: a few blocks.
"""

from __future__ import annotations

import math
import os
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from argonne import files
from argonne.data.permutation import key_of, permute
from argonne.data.windows import Position, RowKey, Rows
from argonne.errors import InputError

VERSION = 1
BLOCK = 65_536
KEPT_BLOCKS = 4
PAIRS_TRIED = 32


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
    """The row, numbered from 0, of each item. Lengths lie in 1 .. size.

    Row by row: the longest item that is left and fits, again and again, until two can fill what is left exactly; of
    such pairs the most even one, so that short items last until the end. Fuller by one part in seventy than best fit
    decreasing where lengths are alike (GSM8K).
    """
    rows = np.empty(len(lengths), np.int64)
    order = np.argsort(lengths, kind="stable")
    bounds = np.searchsorted(lengths[order], np.arange(size + 2)).tolist()
    items, ends = order.tolist(), bounds[1:]  # of length n there are left: items[bounds[n] : ends[n]]
    there = sum(1 << int(length) for length in np.unique(lengths))  # bit n: some of length n are left
    row = 0

    def take(length: int) -> None:
        nonlocal there
        ends[length] -= 1
        rows[items[ends[length]]] = row
        if ends[length] == bounds[length]:
            there ^= 1 << length

    def longer_of_pair(room: int) -> int:
        for longer in range(-(-room // 2), min(there.bit_length(), room, room // 2 + PAIRS_TRIED)):
            if there >> longer & there >> room - longer & 1 and (
                2 * longer > room or ends[longer] - bounds[longer] > 1
            ):
                return longer
        return 0

    while there:
        room = size
        while fitting := there & ((2 << room) - 1):
            longest = fitting.bit_length() - 1
            if longest < room < size and (longer := longer_of_pair(room)):
                take(longer)
                take(room - longer)
                break
            take(longest)
            room -= longest
        row += 1
    return rows


class PackedRows:
    """The rows of one source of conversations, in the place of `SourceWindows`. In a `Position` here `used` counts rows
    of the epoch, which is packed for rows of `piece` tokens.
    """

    def __init__(
        self, name: str, fingerprint: str, ends: np.ndarray, cache: Path | None = None, max_epochs: float = math.inf
    ) -> None:
        """ends: (conversations,) positions in the stream just after each. Behind `max_epochs` passes are estimates."""
        self.name, self.fingerprint, self.ends = name, fingerprint, ends
        self.cache, self.max_epochs = cache, max_epochs
        self._packed: dict[tuple[int, int, int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._counts: dict[tuple[int, int, int], np.ndarray] = {}

    @property
    def blocks(self) -> int:
        return -(-len(self.ends) // BLOCK)

    def epoch_rows(self, key: RowKey, epoch: int) -> int:
        return int(self._rows_before(key.sequence_length, key.seed, epoch)[-1])

    def rows_left(self, key: RowKey, position: Position) -> int:
        """Rows from `position` to the end of its epoch."""
        piece = self._piece(key, position)
        return int(self._rows_before(piece, key.seed, position.epoch)[-1]) - position.used

    def advance(self, key: RowKey, position: Position, rows: int) -> Position:
        """Where the source stands after `rows` more rows."""
        if rows == 0:
            return position
        place = replace(position, piece=self._piece(key, position))
        while rows > (left := self.rows_left(key, place)):
            rows -= left
            place = Position(place.epoch + 1, key.sequence_length, 0)
        return replace(place, used=place.used + rows)

    def passes(self, key: RowKey, position: Position, rows: int) -> float:
        """How often the source has been read after `rows` more rows."""
        place = replace(position, piece=self._piece(key, position))
        while rows > (left := self.rows_left(key, place)):
            rows -= left
            place = Position(place.epoch + 1, key.sequence_length, 0)
            if place.epoch > self.max_epochs:
                return place.epoch + rows / len(self.ends)
        used = place.used + rows
        return place.epoch + (used / self._rows_before(place.piece, key.seed, place.epoch)[-1] if used else 0.0)

    def locate(self, key: RowKey, position: Position, draws: np.ndarray) -> tuple[Rows, np.ndarray]:
        """(where the rows `draws` lie, the epoch of each). `draws` (int64, ascending) counts rows from `position`
        on.
        """
        rows = Rows(np.full(len(draws), -1, np.int64), {})
        epochs = np.empty(len(draws), np.int64)
        place, before, done = replace(position, piece=self._piece(key, position)), 0, 0
        while done < len(draws):
            left = self.rows_left(key, place)
            until = done + int(np.searchsorted(draws[done:], before + left))
            for index in range(done, until):
                number = place.used + int(draws[index]) - before
                rows.runs[index] = self._runs(place.piece, key.seed, place.epoch, number)
            epochs[done:until] = place.epoch
            before, done = before + left, until
            place = Position(place.epoch + 1, key.sequence_length, 0)
        return rows, epochs

    def _piece(self, key: RowKey, position: Position) -> int:
        """For which length the epoch is packed: an epoch that has begun stays as it is, also under longer rows."""
        piece = position.piece if position.used else key.sequence_length
        if piece > key.sequence_length:
            raise InputError(
                f"{self.name}: its epoch has begun with rows of {piece:,} tokens, the next are to have "
                f"{key.sequence_length:,}; keep data.sequence_length, or change it where an epoch ends"
            )
        return piece

    def _runs(self, piece: int, seed: int, epoch: int, number: int) -> list[tuple[int, int]]:
        """(first token, tokens) of each conversation of a row."""
        before = self._rows_before(piece, seed, epoch)
        block = int(np.searchsorted(before, number, side="right")) - 1
        items, edges = self._block(piece, seed, epoch, block)
        inside = number - int(before[block])
        chosen = items[edges[inside] : edges[inside + 1]]
        begins, ends = self._begins(chosen), self.ends[chosen]
        return list(zip(begins.tolist(), (ends - begins).tolist(), strict=True))

    def _begins(self, items: np.ndarray) -> np.ndarray:
        return np.where(items > 0, self.ends[np.maximum(items - 1, 0)], 0)

    def _rows_before(self, piece: int, seed: int, epoch: int) -> np.ndarray:
        """(blocks + 1,) rows of an epoch before each block, and all of them."""
        key = (piece, seed, epoch)
        found = self._counts.get(key)
        if found is None:
            path = self._path(piece, seed, epoch, "rows")
            if path is not None and path.exists():
                found = np.load(path)
            else:
                counts = [len(self._block(piece, seed, epoch, block)[1]) - 1 for block in range(self.blocks)]
                found = np.cumsum([0, *counts], dtype=np.int64)
                self._keep(path, found)
            self._counts[key] = found
        return found

    def _block(self, piece: int, seed: int, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(conversations in the order of the rows, where each row begins among them and the last ends). Two threads may
        make the same block: both make the same.
        """
        key = (piece, seed, epoch, block)
        found = self._packed.get(key)
        if found is None:
            path = self._path(piece, seed, epoch, f"{block:06d}")
            if path is not None and path.exists():
                flat = np.load(path)
                rows = int(flat[0])
                found = flat[rows + 2 :], flat[1 : rows + 2]
            else:
                found = self._pack(piece, seed, epoch, block)
                self._keep(path, np.concatenate([[len(found[1]) - 1], found[1], found[0]]))
            self._packed = {**dict(list(self._packed.items())[1 - KEPT_BLOCKS :]), key: found}
        return found

    def _pack(self, piece: int, seed: int, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(self.ends)
        places = np.arange(block * BLOCK, min(count, (block + 1) * BLOCK))
        items = permute(places, count, key_of("conversations", seed, self.fingerprint, epoch))
        lengths = self.ends[items] - self._begins(items)
        if int(lengths.max(initial=0)) > piece:
            raise InputError(
                f"{self.name}: a conversation of {int(lengths.max()):,} tokens does not fit into a row of {piece:,}; "
                "raise data.sequence_length"
            )
        bins = best_fit(lengths, piece)
        rows = int(bins.max(initial=-1)) + 1
        shuffled = permute(bins, rows, key_of("rows", seed, self.fingerprint, epoch, block))
        # Within a row in the order of the epoch, not the longest first.
        order = np.argsort(shuffled, kind="stable")
        return items[order], np.searchsorted(shuffled[order], np.arange(rows + 1))

    def _path(self, piece: int, seed: int, epoch: int, name: str) -> Path | None:
        """None where nothing is kept: a single block is packed in a fifth of a second."""
        if self.cache is None or self.blocks == 1:
            return None
        key = files.fingerprint([VERSION, BLOCK, self.fingerprint, piece, seed, epoch])[:24]
        return self.cache / f"packed-{key}-{name}.npy"

    @staticmethod
    def _keep(path: Path | None, array: np.ndarray) -> None:
        """Others see the whole file or none. Threads may write the same one at once, and ranks in containers that have
        the same process id. What the start of another run takes for a leftover is packed again by whoever asks.
        """
        if path is not None:
            temporary = path.with_name(f"{files.TEMPORARY}{uuid.uuid4().hex}-{path.name}")
            with suppress(FileNotFoundError):
                np.save(temporary, array)
                files.fsync_path(temporary)
                os.replace(temporary, path)
