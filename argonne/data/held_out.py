"""Held-out windows: evenly spread over the held-out tokens of all sources, the same ones at each call. They touch neither order nor state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from argonne.data.document_mask import mask_documents
from argonne.data.phases import Source


class HeldOut:
    """Windows of `length` tokens over the held-out parts of `sources`; `eos_id` ends documents where these are masked."""

    def __init__(self, sources: Sequence[Source], length: int, eos_id: int | None, *, document_mask: bool) -> None:
        self.length, self.eos_id, self.document_mask = length, eos_id, document_mask
        self._parts = [
            (number, source, (source.tokens.held_out.tokens - 1) // length)
            for number, source in enumerate(sources)
            if source.tokens.held_out.tokens > length
        ]

    @property
    def windows(self) -> int:
        """Windows there are."""
        return sum(count for _, _, count in self._parts)

    def batches(self, windows: int, rows: int) -> Iterator[Mapping[str, torch.Tensor]]:
        """At most `windows` of them in batches of at most `rows`, under the names of a training batch."""
        places = list(self._places(min(windows, self.windows)))
        for start in range(0, len(places), rows):
            yield self._batch(places[start : start + rows])

    def _places(self, count: int) -> Iterator[tuple[int, Source, int]]:
        """(number of the source, the source, window within it) of `count` windows."""
        for index in range(count):
            number = index * self.windows // count
            for which, source, here in self._parts:
                if number < here:
                    yield which, source, number
                    break
                number -= here

    def _batch(self, places: Sequence[tuple[int, Source, int]]) -> Mapping[str, torch.Tensor]:
        length = self.length
        rows = np.zeros((len(places), length + 1), dtype=np.int64)
        for row, (_, source, number) in zip(rows, places, strict=True):
            source.tokens.held_out.copy(number * length, row)
        inputs, labels = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        arrays = {"input_ids": inputs, "shift_labels": labels, "source": np.array([number for number, _, _ in places])}
        if self.document_mask:
            arrays["position_ids"] = np.zeros_like(inputs)
            for number in range(len(places)):
                mask_documents(np.nonzero(inputs[number] == self.eos_id)[0] + 1, labels[number], arrays["position_ids"][number])
        arrays["tokens"] = (labels >= 0).sum(axis=1)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
