"""Quotas: exact, for any weights and any count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from argonne.data.mixture import counts, deal, exact_weight, integer_weights
from argonne.errors import InputError

weight_lists = st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(any)


@given(weights=weight_lists, start=st.integers(0, 10**12), length=st.integers(0, 300))
def test_a_run_of_samples_is_dealt_as_the_counts_say(weights: list[int], start: int, length: int) -> None:
    source, draw = deal(weights, start, start + length)
    before, after = counts(weights, start), counts(weights, start + length)
    for number in range(len(weights)):
        assert draw[source == number].tolist() == list(range(before[number], after[number]))


@given(weights=weight_lists, blocks=st.integers(0, 50), start=st.integers(0, 20))
def test_every_block_of_the_weights_sum_has_exact_quotas(weights: list[int], blocks: int, start: int) -> None:
    block = sum(weights)
    source, _ = deal(weights, start * block, (start + blocks) * block)
    assert np.bincount(source, minlength=len(weights)).tolist() == [blocks * weight for weight in weights]


@given(weights=weight_lists, samples=st.integers(0, 10**9))
@example(weights=[60, 7, 1, 1, 60], samples=381)  # 2.79 rows off
def test_no_prefix_drifts_from_its_share_by_a_row_for_each_halving_of_the_sources(
    weights: list[int], samples: int
) -> None:
    halvings = (len(weights) - 1).bit_length()
    for count, weight in zip(counts(weights, samples), weights, strict=True):
        off = abs(count * sum(weights) - samples * weight)
        assert off < halvings * sum(weights) or off == 0
        assert weight or not count


@pytest.mark.parametrize("shares", [(1 / 3, 0.1234567890123, 5e-7), (0.12345678901234567, 0.98765432109876543, 3e-17)])
def test_weights_with_many_digits_stay_exact(shares: tuple[float, ...]) -> None:
    weights = integer_weights([exact_weight(share) for share in shares])
    source, draw = deal(weights, 10**11, 10**11 + 5000)
    before, after = counts(weights, 10**11), counts(weights, 10**11 + 5000)
    for number in range(3):
        assert draw[source == number].tolist() == list(range(before[number], after[number]))


def test_decimal_weights_are_the_fractions_their_digits_say() -> None:
    assert integer_weights([exact_weight(weight) for weight in (0.845, 0.155)]) == [169, 31]
    assert integer_weights([exact_weight(weight) for weight in (50.0, 30.0, 20.0)]) == [5, 3, 2]


def test_negative_and_all_zero_weights_are_refused() -> None:
    with pytest.raises(InputError, match="weight -1"):
        exact_weight(-1.0)
    with pytest.raises(InputError, match="every weight is zero"):
        integer_weights(["0", "0"])
