"""What a model has to beat on the same text: uniform, unigram and bigram token models, and xz."""

from __future__ import annotations

import lzma
from collections.abc import Sequence

import numpy as np

from argonne.errors import InputError


def uniform_bits(tokens: int, vocab_size: int) -> float:
    """Bits for `tokens` tokens when every entry of the vocabulary is as likely."""
    return float(tokens * np.log2(vocab_size))


def unigram_bits(train: np.ndarray, held_out: Sequence[np.ndarray], vocab_size: int) -> float:
    """Bits for the held-out documents under the token frequencies of `train`, add-one smoothed."""
    probabilities = _unigram(train, vocab_size)
    return float(-np.log2(probabilities[np.concatenate(held_out)]).sum())


def bigram_bits(train: np.ndarray, held_out: Sequence[np.ndarray], vocab_size: int, eos_id: int) -> float:
    """Bits for the held-out documents, each after an EOS, under an interpolated bigram model of `train`.

    `train` is a stream with EOS after each document. Absolute discounting (Ney, Essen and Kneser 1994; Chen and Goodman
    1999, section 2.6): p(w | v) = max(c(v, w) - d, 0) / c(v) + d * types(v) / c(v) * unigram(w), with d = n1 / (n1 + 2
    n2).
    """
    train = train.astype(np.int64)
    keys, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once and twice else 0.5
    context_total = np.bincount(train[:-1], minlength=vocab_size).astype(np.float64)
    context_types = np.bincount(keys // vocab_size, minlength=vocab_size).astype(np.float64)
    before = np.concatenate([np.concatenate([[eos_id], document[:-1]]) for document in held_out]).astype(np.int64)
    after = np.concatenate(held_out).astype(np.int64)
    wanted = before * vocab_size + after
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    seen = np.where(keys[place] == wanted, counts[place], 0).astype(np.float64)
    total = context_total[before]
    unigram = _unigram(train, vocab_size)[after]
    safe = np.maximum(total, 1.0)
    mixed = np.maximum(seen - discount, 0.0) / safe + discount * context_types[before] / safe * unigram
    return float(-np.log2(np.where(total > 0, mixed, unigram)).sum())


def _unigram(train: np.ndarray, vocab_size: int) -> np.ndarray:
    if len(train) < 2:
        raise InputError(f"baselines: found {len(train)} training tokens, expected at least 2")
    counts = np.bincount(train, minlength=vocab_size).astype(np.float64) + 1.0
    return np.asarray(counts / counts.sum())


def xz_bits(text: bytes, before: bytes = b"") -> float:
    """Bits that `xz -9` adds for `text`; with `before`, what it adds behind a text it has already packed."""
    packed = len(lzma.compress(before + text, preset=9))
    return 8.0 * (packed - (len(lzma.compress(before, preset=9)) if before else 0))
