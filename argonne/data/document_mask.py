"""Documents of a packed row: where they end, and what that does to targets and positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from argonne.tokens.shards import TokenStream

IGNORED = -100


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


def ends_in_row(stream: TokenStream, runs: Sequence[tuple[int, int]], inputs: np.ndarray, eos_id: int | None) -> np.ndarray:
    """Places in a row made of `runs` (start, length) of the stream just after each document; by `eos_id` where the stream keeps no ends."""
    if not stream.has_documents:
        return np.nonzero(inputs == eos_id)[0] + 1
    found, filled = [], 0
    for begin, size in runs:
        found.append(stream.ends_between(begin, begin + size) - begin + filled)
        filled += size
    return np.concatenate(found)
