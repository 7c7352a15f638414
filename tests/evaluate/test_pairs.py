"""Paired tests: equal to scipy and statsmodels, right about equal models, and as sharp as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from argonne.evaluate.pairs import LEVEL, POWER, holm, mcnemar, of_ratios, of_shares, smallest_share

TABLES = [(0, 1), (1, 1), (3, 9), (10, 5), (12, 30), (59, 121), (0, 17), (400, 470)]
PAIRS = 2000


@pytest.mark.parametrize("table", TABLES)
def test_the_exact_test_is_that_of_scipy_and_statsmodels_and_mid_p_is_less_half_a_tie(table: tuple[int, int]) -> None:
    from scipy.stats import binom, binomtest
    from statsmodels.stats.contingency_tables import mcnemar as theirs

    b, c = table
    exact = mcnemar(b, c, mid=False)
    assert exact == pytest.approx(binomtest(b, b + c).pvalue, rel=1e-9)
    assert exact == pytest.approx(theirs([[5, b], [c, 7]], exact=True).pvalue, rel=1e-9)
    mid = 2 * binom.cdf(min(b, c) - 1, b + c, 0.5) + binom.pmf(min(b, c), b + c, 0.5) if b != c else 1.0
    assert mcnemar(b, c) == pytest.approx(mid, rel=1e-9)


def test_holm_is_that_of_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    values = [0.011, 0.8, 0.02, 0.0004, 0.04, 0.04]
    assert holm(values) == pytest.approx(multipletests(values, method="holm")[1])


def test_of_equal_models_the_exact_test_rejects_at_most_one_in_twenty_and_mid_p_about_that() -> None:
    draw = np.random.default_rng(0)
    differing = draw.binomial(1000, 0.2, PAIRS)
    tables = [(int(b), int(n - b)) for n, b in zip(differing, draw.binomial(differing, 0.5), strict=True)]
    exact, mid = (np.mean([mcnemar(*table, mid=how) <= LEVEL for table in tables]) for how in (False, True))
    assert exact <= LEVEL
    assert mid == pytest.approx(LEVEL, abs=3 * math.sqrt(LEVEL * (1 - LEVEL) / PAIRS))


@pytest.mark.parametrize(("items", "differing"), [(300, 0.3), (1000, 0.2), (14042, 0.5)])
def test_models_that_differ_by_the_smallest_difference_told_are_found_in_four_of_five(
    items: int, differing: float
) -> None:
    draw, x = np.random.default_rng(1), smallest_share(items, differing)
    shares = [(differing - x) / 2, (differing + x) / 2, 1 - differing]
    found = np.mean([mcnemar(int(b), int(c)) <= LEVEL for b, c, _ in draw.multinomial(items, shares, PAIRS)])
    assert found == pytest.approx(POWER, abs=3 * math.sqrt(POWER * (1 - POWER) / PAIRS))


def test_a_difference_of_shares_has_its_value_its_counts_and_an_interval_around_it() -> None:
    found, first_only, second_only = of_shares([True] * 6 + [False] * 4, [True] * 3 + [False] * 3 + [True] * 4)
    assert (first_only, second_only) == (3, 4)
    assert found.value == pytest.approx(0.1)
    assert found.low < 0.1 < found.high
    assert found.p == mcnemar(3, 4)


def test_bits_of_the_same_documents_differ_by_their_ratio_and_equal_ones_do_not() -> None:
    draw = np.random.default_rng(2)
    sizes = draw.integers(100, 2000, 80).astype(float)
    first = sizes * draw.normal(1.2, 0.3, 80)
    worse = of_ratios(first, first + sizes * draw.normal(0.02, 0.02, 80), sizes)
    assert worse.low < worse.value < worse.high
    assert worse.p < 0.001
    assert of_ratios(first, first, sizes).p == 1.0
    noise = of_ratios(first, first + sizes * draw.normal(0, 0.02, 80), sizes)
    assert noise.p > 0.05
