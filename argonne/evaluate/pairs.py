"""Two models on the same items: tests of a paired difference, and what difference a set can see at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL, POWER = 0.05, 0.8
DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """Second model minus first. p: two-sided. low, high: 95 % confidence interval."""

    value: float
    p: float
    low: float
    high: float


def mcnemar(first_only: int, second_only: int, *, mid: bool = True) -> float:
    """Two-sided p of items that only one of two models gets right, half of which are each one's where they are equal.

    Exact: binomial, twice the smaller tail (McNemar 1947, Psychometrika 12). mid: the mid-p of Fagerland, Lydersen and
    Laake 2013 (BMC Medical Research Methodology 13:91), less half the probability of what was seen on each side.
    """
    n, smaller = first_only + second_only, min(first_only, second_only)
    seen = math.exp(math.lgamma(n + 1) - math.lgamma(smaller + 1) - math.lgamma(n - smaller + 1) - n * math.log(2))
    tail, term = seen, seen
    for k in range(smaller, 0, -1):  # of k - 1 from that of k
        term *= k / (n - k + 1)
        tail += term
        if term < 1e-17 * tail:
            break
    if first_only == second_only:
        return 1.0
    return 2 * tail - seen if mid else min(1.0, 2 * tail)


def of_shares(first: Sequence[bool], second: Sequence[bool]) -> tuple[Difference, int, int]:
    """The difference of two accuracies on the same items by mid-p, and how many items only the one and only the other
    gets right. Interval: of the paired difference (Wald, with a count added to each side; Agresti and Min 2005).
    """
    one, two = np.array(first, bool), np.array(second, bool)
    n, b, c = len(one), int((one & ~two).sum()), int((two & ~one).sum())
    value = (c - b) / n
    wide = NormalDist().inv_cdf(1 - LEVEL / 2)
    spread = wide * math.sqrt(b + c + 1 - (c - b) ** 2 / (n + 2)) / (n + 2)
    middle = (c - b) / (n + 2)
    return Difference(value, mcnemar(b, c), middle - spread, middle + spread), b, c


def of_ratios(first: np.ndarray, second: np.ndarray, sizes: np.ndarray, seed: int = 0) -> Difference:
    """The difference of two sums over documents, each divided by the sum of `sizes`, by a bootstrap over documents that
    draws both models' together (Koehn 2004, W04-3250).
    """
    draw, parts, n = np.random.default_rng(seed), second - first, len(sizes)
    found = np.empty(DRAWS)
    for start in range(0, DRAWS, 500):
        counts = draw.multinomial(n, np.full(n, 1 / n), size=500)
        found[start : start + 500] = counts @ parts / (counts @ sizes)
    low, high = np.quantile(found, [LEVEL / 2, 1 - LEVEL / 2])
    beyond = min((found <= 0).mean(), (found >= 0).mean())
    return Difference(
        float(parts.sum() / sizes.sum()), float(min(1.0, 2 * beyond + 1 / DRAWS)), float(low), float(high)
    )


def holm(values: Sequence[float]) -> list[float]:
    """Each p corrected for the number of tests (Holm 1979), in the order given."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    found, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        found[index] = largest
    return found


def smallest_share(items: int, differing: float = 0.5) -> float:
    """The difference of two accuracies that a test at 5 % finds in 80 % of cases, where the models differ on the share
    `differing` of the items: half is what two unrelated models of middling accuracy do.

    Connor 1987 (Biometrics 43): n = (z_a sqrt(d) + z_b sqrt(d - x^2))^2 / x^2 for the difference x.
    """
    level, power = NormalDist().inv_cdf(1 - LEVEL / 2), NormalDist().inv_cdf(POWER)

    def needed(x: float) -> float:
        return ((level * math.sqrt(differing) + power * math.sqrt(max(0.0, differing - x * x))) / x) ** 2

    low, high = 1e-9, differing
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if needed(middle) <= items else (middle, high)
    return high
