"""The shuffled order: a permutation for each key, the same in every version."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.data.permutation import permute

STORED = [126, 910, 368, 56, 320, 397, 247, 278]
STORED_SMALL = [[0], [1, 0], [0, 2, 1], [3, 2, 1, 0], [2, 3, 0, 4, 1], [2, 3, 5, 4, 1, 0]]


@settings(deadline=None)
@given(count=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_the_permutation_visits_every_item_once(count: int, key: int) -> None:
    assert sorted(permute(np.arange(count), count, key).tolist()) == list(range(count))


@given(count=st.integers(10**6, 10**12), key=st.integers(0, 2**32), start=st.integers(0, 10**5))
def test_the_permutation_of_a_large_count_stays_inside_and_has_no_repeat(count: int, key: int, start: int) -> None:
    image = permute(np.arange(start, start + 500), count, key)
    assert image.min() >= 0
    assert image.max() < count
    assert len(set(image.tolist())) == 500


def test_the_permutation_of_version_1_never_changes() -> None:
    assert permute(np.arange(8), 1000, 444).tolist() == STORED
    assert [permute(np.arange(count), count, 444).tolist() for count in range(1, 7)] == STORED_SMALL


def test_different_keys_give_different_orders_and_neighbours_are_parted() -> None:
    first, second = permute(np.arange(1000), 1000, 1), permute(np.arange(1000), 1000, 2)
    assert (first != second).mean() > 0.9
    assert (np.abs(np.diff(first)) == 1).mean() < 0.02
