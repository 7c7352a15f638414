"""The baselines against their formulas, computed slowly."""

from __future__ import annotations

import lzma
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.errors import InputError
from argonne.evaluate.baselines import bigram_bits, uniform_bits, unigram_bits, xz_bits

STREAMS = st.lists(st.integers(min_value=0, max_value=7), min_size=2, max_size=80)
VOCABULARY, EOS = 8, 0


def slow_unigram(train: list[int]) -> list[float]:
    counts = Counter(train)
    return [(counts[token] + 1) / (len(train) + VOCABULARY) for token in range(VOCABULARY)]


def slow_bigram(train: list[int]) -> list[list[float]]:
    """p[v][w], straight from the docstring of `bigram_bits`."""
    pairs, unigram = Counter(pairwise(train)), slow_unigram(train)
    once, twice = (sum(1 for count in pairs.values() if count == number) for number in (1, 2))
    discount = once / (once + 2 * twice) if once and twice else 0.5
    table = []
    for before in range(VOCABULARY):
        row = [pairs[before, after] for after in range(VOCABULARY)]
        total, types = sum(row), sum(count > 0 for count in row)
        if total:
            table.append(
                [
                    max(count - discount, 0) / total + discount * types / total * unigram[after]
                    for after, count in enumerate(row)
                ]
            )
        else:
            table.append(unigram)
    return table


@settings(max_examples=100, deadline=None)
@given(STREAMS, st.lists(STREAMS, min_size=1, max_size=3))
def test_unigram_and_bigram_equal_their_formulas(train: list[int], held_out: list[list[int]]) -> None:
    documents = [np.array(document) for document in held_out]
    unigram, bigram = slow_unigram(train), slow_bigram(train)
    expected = -sum(math.log2(unigram[token]) for document in held_out for token in document)
    assert unigram_bits(np.array(train), documents, VOCABULARY) == pytest.approx(expected)
    expected = -sum(
        math.log2(bigram[before][after]) for document in held_out for before, after in pairwise([EOS, *document])
    )
    assert bigram_bits(np.array(train), documents, VOCABULARY, EOS) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(STREAMS)
def test_every_row_of_the_bigram_model_is_a_distribution(train: list[int]) -> None:
    for before in range(VOCABULARY):
        bits = [
            bigram_bits(np.array(train), [np.array([before, after])], VOCABULARY, EOS) for after in range(VOCABULARY)
        ]
        first = bigram_bits(np.array(train), [np.array([before])], VOCABULARY, EOS)
        assert sum(2 ** -(value - first) for value in bits) == pytest.approx(1.0)


def test_uniform_is_the_logarithm_of_the_vocabulary() -> None:
    assert uniform_bits(10, 256) == 80.0


def test_xz_counts_only_what_the_new_text_adds() -> None:
    text = bytes(range(256)) * 40
    assert xz_bits(text) == 8 * len(lzma.compress(text, preset=9))
    assert 0 < xz_bits(text, before=text) < xz_bits(text)


def test_an_empty_training_stream_is_refused() -> None:
    with pytest.raises(InputError, match="found 0 training tokens"):
        unigram_bits(np.array([], dtype=np.int64), [np.array([1])], 8)
