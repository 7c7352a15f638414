"""Arithmetic that loops do for all lanes at once."""

from __future__ import annotations

import numpy as np
from numba import njit

from argonne.serve.compiled import FARTHEST, dot, exponential


@njit
def exponentials(x: np.ndarray) -> np.ndarray:
    found = np.empty_like(x)
    for at in range(len(x)):
        found[at] = exponential(x[at])
    return found


def test_the_exponential_is_as_exact_as_fp32_is() -> None:
    x = np.linspace(-FARTHEST, FARTHEST, 100_001).astype(np.float32)
    assert np.max(np.abs(exponentials(x) / np.exp(x.astype(np.float64)) - 1)) < 2e-7


def test_beyond_what_fp32_holds_it_stays_finite_and_nan_stays_nan() -> None:
    found = exponentials(np.array([-np.inf, -1e9, 1e9, np.inf, np.nan], np.float32))
    least, most = np.exp(np.float64([-FARTHEST, FARTHEST]))
    assert np.allclose(found[:4], [least, least, most, most], rtol=1e-6)
    assert np.isnan(found[4])


def test_a_dot_product_is_of_all_numbers() -> None:
    for size in (0, 1, 7, 16, 33, 64):
        numbers = np.arange(size, dtype=np.float32)
        assert dot(numbers, numbers) == float((numbers.astype(np.int64) ** 2).sum())
