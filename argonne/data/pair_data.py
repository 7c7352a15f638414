"""Preference pairs as the data of a run: a pair lies in one packed row, its chosen conversation first, and carries the
scores that the weights gave it with which training starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from argonne import files
from argonne.data.chat_data import ConversationData
from argonne.data.rendered import SIDES
from argonne.data.windows import Position, RowKey
from argonne.errors import InputError
from argonne.prepare.progress import ProgressBar

VERSION = 1
REFERENCES = "references"  # in the cache
TOKENS_A_PASS = 16_384  # of a forward pass of the reference: fixed, so that the scores do not depend on the training


class Ranks(Protocol):
    """What the pass of the reference needs of the mesh."""

    @property
    def is_main(self) -> bool: ...
    @property
    def data_rank(self) -> int: ...
    @property
    def data_size(self) -> int: ...
    def broadcast(self, value: Any) -> Any: ...
    def gather(self, value: Any) -> list[Any]: ...
    def barrier(self) -> None: ...


class Scores(Protocol):
    """(rows, P, 2) summed log-probabilities of the answers of each pair of a micro-batch, by a model on its mesh."""

    def __call__(self, model: Any, micro: Mapping[str, torch.Tensor]) -> np.ndarray: ...


@dataclass(frozen=True)
class Reference:
    """Where the scores are kept, and under what. model: the identity of the weights. begun: training has begun, so that
    the model is no longer the one that would have to give them.
    """

    cache: Path
    model: str
    begun: bool
    scores: Scores


class PairData(ConversationData):
    """Rows of packed pairs, each counted once. What `open_conversations(kind=PairData)` returns; `reference` is to be
    set before `attach`.
    """

    unit = "pairs"
    together = 2
    reference: Reference
    known: dict[str, list[np.ndarray]] | None = None  # side -> (pairs, 2) float32 of each source

    def attach(self, model: object, mesh: Ranks) -> None:  # type: ignore[override] # more than rank 0 alone takes part
        """Take the reference's scores from the cache, or make them once: every rank a share of the rows."""
        key = files.fingerprint([VERSION, self.reference.model, [one.fingerprint for one in self.rendered]])[:24]
        place = self.reference.cache / REFERENCES / key
        found = mesh.broadcast(self._load(place) if mesh.is_main and place.exists() else None)
        if isinstance(found, InputError):
            raise found
        self.known = found
        if self.known is None:
            if self.reference.begun:
                raise InputError(
                    f"{place}: the scores of the weights that this run began with are gone, and its own have moved on; "
                    "restore that folder, or start again with another --run"
                )
            self.known = self._score(model, mesh)
            if mesh.is_main:
                with files.one_at_a_time(place.parent / ".lock"):
                    files.collect_temporaries(place.parent)
                    with files.atomic_directory(place, replace=True) as temporary:
                        for side, arrays in self.known.items():
                            for number, array in enumerate(arrays):
                                np.save(temporary / f"{side}-{number}.npy", array)
        mesh.barrier()

    def _load(self, place: Path) -> dict[str, list[np.ndarray]] | InputError:
        if problems := files.verify_directory(place):
            return InputError(f"{place}: {problems[0]}; remove that folder, and the scores are made anew")
        count = range(len(self.rendered))
        return {side: [np.load(place / f"{side}-{number}.npy") for number in count] for side in SIDES}

    def _score(self, model: object, mesh: Ranks) -> dict[str, list[np.ndarray]]:
        """One pass over all rows, in an order that only the data decides."""
        length = self.data.sequence_length
        found = {
            side: [np.full((len(self.items_of(one, side)), 2), np.nan, np.float32) for one in self.rendered]
            for side in SIDES
        }
        batches = list(self._batches(max(1, TOKENS_A_PASS // length)))
        bar = ProgressBar("reference", len(batches) * TOKENS_A_PASS, "stderr" if mesh.is_main else None)
        for start in range(0, len(batches), mesh.data_size):
            # A forward pass may be a collective: a rank without a batch of its own makes the last one too.
            number = min(start + mesh.data_rank, len(batches) - 1)
            side, located = batches[number]
            micro = {
                name: torch.from_numpy(array)
                for name, array in self._rows(located, side, len(located), length, known=False).items()
            }
            found_scores = self.reference.scores(model, micro)
            for (source, runs), scores in zip(located, found_scores, strict=True):
                pairs = self._pairs(source, side, runs)
                found[side][source][pairs] = scores[: len(pairs)]
            at_once = batches[start : start + mesh.data_size]
            pairs_done = sum(len(runs) for _, rows in at_once for _, runs in rows)
            bar.add(len(at_once) * TOKENS_A_PASS, pairs_done, len(at_once) * TOKENS_A_PASS, 0)
        bar.close()
        gathered = mesh.gather(found)
        for side in SIDES:
            for number in range(len(self.rendered)):
                for other in gathered:
                    mine, its = found[side][number], other[side][number]
                    np.copyto(mine, its, where=np.isnan(mine))
                if not np.isfinite(found[side][number]).all():
                    raise InputError(
                        f"{self.sources[number].name}: the weights that training starts with give pairs scores that "
                        "are not finite; they are damaged"
                    )
        return found

    def _batches(self, rows: int) -> Iterator[tuple[str, list[tuple[int, list[tuple[int, int]]]]]]:
        """(side, rows located) of every row of every source, packed as no epoch of the training need be."""
        key = RowKey(self.data.sequence_length, "shuffled", "packed", 0)
        for side in SIDES:
            for source in range(len(self.rendered)):
                held = side == "held_out"
                packed = (
                    self._held_out[source] if held else self.mixture.windows[self.sources[source].tokens.fingerprint]
                )
                count = packed.rows_left(key, Position())
                for start in range(0, count, rows):
                    found, _ = packed.locate(key, Position(), np.arange(start, min(count, start + rows)))
                    yield side, [(source, found.runs[row]) for row in sorted(found.runs)]

    def _pairs(self, source: int, side: str, runs: list[tuple[int, int]]) -> np.ndarray:
        """The numbers of a row's pairs in the stream."""
        begins = np.array([begin for begin, _ in runs], np.int64)
        return np.searchsorted(self.items_of(self.rendered[source], side), begins, side="right")

    def _conversations(self, ends: np.ndarray, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        parts = []
        for begin, size in runs:
            middle = int(ends[np.searchsorted(ends, begin, side="right")])
            parts += [(begin, middle - begin), (middle, begin + size - middle)]
        return parts

    def _rows(
        self,
        located: Any,
        side: str,
        rows: int,
        length: int,
        known: bool = True,
    ) -> dict[str, np.ndarray]:
        """Beside those of conversations: answer (rows, T), 2 n for what belongs to the chosen conversation of the row's
        pair n, 2 n + 1 to the rejected; pairs (rows,), how many there are; reference (rows, P, 2) float32, the scores
        that the reference gave them (zeros unless they are known).
        """
        arrays = super()._rows(located, side, rows, length)
        most = max([1, *(len(runs) for _, runs in located)])
        answer = np.zeros((rows, length), np.int64)
        pairs, reference = np.zeros(rows, np.int64), np.zeros((rows, most, 2), np.float32)
        for row, (source, runs) in enumerate(located):
            sizes = [size for _, size in self._conversations(self.rendered[source].ends[side], runs)]
            answer[row, : sum(sizes)] = np.repeat(np.arange(len(sizes)), sizes)
            pairs[row] = len(runs)
            if self.known is not None and known:
                reference[row, : len(runs)] = self.known[side][source][self._pairs(source, side, runs)]
        return {**arrays, "answer": answer, "pairs": pairs, "reference": reference}
