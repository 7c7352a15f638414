"""The keys and values of running answers: one buffer a layer, a slot an answer, written at each one's own place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LENGTH_STEP = 64  # lengths that attention reads: with multiples of it a row's result does not depend on how many


class Slots:
    """What a forward pass takes as its cache. Before the pass `rows_at` or `row_at` says where its tokens go.

    The buffers (slots, heads, capacity, D) are made when the first keys come, in their dtype and on their device.
    """

    def __init__(self, count: int, capacity: int) -> None:
        self.count, self.capacity = count, -(-capacity // LENGTH_STEP) * LENGTH_STEP
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._rows, self._places, self._length = slice(0, 0), torch.zeros(0, dtype=torch.int64), 0

    def rows_at(self, places: Tensor) -> None:
        """The next pass brings one token for each of the first len(places) slots, which goes to its place."""
        self._rows, self._places = slice(0, len(places)), places
        self._length = self._read(int(places.max()) + 1)

    def row_at(self, slot: int, begin: int, size: int) -> None:
        """The next pass brings `size` tokens of one slot, which go to begin .. begin + size - 1."""
        self._rows, self._places = slice(slot, slot + 1), torch.arange(begin, begin + size)
        self._length = self._read(begin + size)

    def _read(self, used: int) -> int:
        """The length bucket: a power of two times LENGTH_STEP, so that few shapes occur."""
        length = LENGTH_STEP
        while length < used:
            length *= 2
        return min(length, self.capacity)

    def masks(self, windows: dict[str, int | None], device: torch.device) -> dict[str, Tensor]:
        """What each token of the next pass sees, by layer type: (rows, 1, tokens, length) bool."""
        one_each = self._rows.stop - self._rows.start == len(self._places) and self._rows.start == 0
        places = self._places[:, None, None, None] if one_each else self._places[None, None, :, None]
        distance = places - torch.arange(self._length)
        seen = distance >= 0
        return {
            kind: (seen if window is None else seen & (distance < window)).to(device)
            for kind, window in windows.items()
        }

    def update(self, key: Tensor, value: Tensor, layer: int, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Write a pass's keys and values (rows, heads, tokens, D) of a layer; all that its tokens may see."""
        if layer not in self._keys:
            shape = (self.count, key.shape[1], self.capacity, key.shape[3])
            self._keys[layer], self._values[layer] = key.new_zeros(shape), value.new_zeros(shape)
        places, found = self._places.to(key.device), []
        for held, new in ((self._keys[layer], key), (self._values[layer], value)):
            rows = held[self._rows]
            if new.shape[2] == 1:
                rows[torch.arange(len(rows), device=key.device), :, places] = new[:, :, 0]
            else:
                rows[:, :, int(places[0]) : int(places[0]) + len(places)] = new
            found.append(rows[:, :, : self._length])
        return found[0], found[1]

    def get_seq_length(self, layer: int = 0) -> int:
        return self._length

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` places of one slot to another."""
        for held in (*self._keys.values(), *self._values.values()):
            held[target, :, :length] = held[source, :, :length]
