"""The keys and values of running answers: one buffer a layer, a slot an answer, written at each one's own place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LENGTH_STEP = 64  # lengths that attention reads: with multiples of it a row's result does not depend on how many


class Slots:
    """What a forward pass takes as its cache. Before the pass `at` says where its tokens go.

    The buffers (slots, heads of keys and of values, capacity, D) are made when the first keys come, in their dtype and
    on their device.
    """

    def __init__(self, count: int, capacity: int) -> None:
        self.count, self.capacity = count, -(-capacity // LENGTH_STEP) * LENGTH_STEP
        self._held: dict[int, Tensor] = {}
        self._seen_by: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> the keys and values its pass may see
        self._window: tuple[int, int, int] | None = None  # of which this holds

    def at(self, slots: Sequence[int], places: Tensor, device: torch.device) -> None:
        """Row r of the next pass is of slots[r]; its token t goes to places[r, t], and nowhere where that is negative.
        places: (rows, tokens).
        """
        self.lines, self.places = torch.tensor(slots), places
        first = slots[0]
        together = list(slots) == list(range(first, first + len(slots)))
        rows, tokens = (places >= 0).nonzero(as_tuple=True)
        self._seen = places.clamp(min=0)
        self._source = rows.to(device), tokens.to(device)
        self._target = torch.tensor(slots)[rows].to(device), places[rows, tokens].to(device)
        self._rows = slice(first, first + len(slots)) if together else torch.tensor(slots, device=device)
        self._length = LENGTH_STEP
        while self._length <= int(places.max()):  # a power of two times LENGTH_STEP, so that few shapes occur
            self._length *= 2
        self._length = min(self._length, self.capacity)
        window = (first, len(slots), self._length) if together else None
        if window is None or window != self._window:
            self._seen_by.clear()
        self._window = window

    def masks(self, windows: dict[str, int | None], device: torch.device) -> dict[str, Tensor]:
        """What each token of the next pass sees, by layer type: (rows, 1, tokens, length) bool."""
        distance = self._seen[:, None, :, None] - torch.arange(self._length)
        seen = distance >= 0
        return {
            kind: (seen if window is None else seen & (distance < window)).to(device)
            for kind, window in windows.items()
        }

    def update(self, key: Tensor, value: Tensor, layer: int, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """`write` as a cache of transformers is called: (rows, heads, tokens, D) each."""
        return self.write(layer, torch.cat((key, value), 1).transpose(1, 2))

    def write(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Write a pass's keys and values (rows, tokens, heads of keys and of values, D) of a layer. Returns all keys
        and all values that its tokens may see, (rows, heads, length, D).
        """
        held, (slots, places) = self.held(layer, new.shape[2], new.shape[3], new), self._target
        held[slots, :, places] = new[self._source] if len(slots) < new.shape[0] * new.shape[1] else new.flatten(0, 1)
        if self._window is None:
            keys, values = held[:, :, : self._length][self._rows].chunk(2, 1)
            return keys, values
        if layer not in self._seen_by:
            keys, values = held[self._rows, :, : self._length].chunk(2, 1)
            self._seen_by[layer] = keys, values
        return self._seen_by[layer]

    def held(self, layer: int, heads: int, size: int, like: Tensor) -> Tensor:
        """A layer's buffer, (slots, heads of keys and of values, capacity, size)."""
        if layer not in self._held:
            self._held[layer] = like.new_zeros(self.count, heads, self.capacity, size)
        return self._held[layer]

    def get_seq_length(self, layer: int = 0) -> int:
        return self._length

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` places of one slot to another."""
        for held in self._held.values():
            held[target, :, :length] = held[source, :, :length]
