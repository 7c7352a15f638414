"""Bits per byte: how well a model predicts text, whatever its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from argonne.errors import InputError
from argonne.evaluate.requests import Headline, Score, ScoreRequest, TaskContext
from argonne.evaluate.texts import EvaluationText, open_texts

BANDS, SHORTEST = 8, 32  # of positions: at most so many, the first at least so long


class BitsPerByte:
    """Sum of -log2 p over all tokens (EOS included) / UTF-8 bytes of the text.

    Each document is read from an EOS on, as in training; a document longer than the context is cut into windows that
    follow one another, each predicted from the last token of the window before (lm-evaluation-harness calls this a
    rolling log-likelihood).
    """

    name = "bpb"
    asks: Literal["scores"] = "scores"
    headline: Headline = ("bits_per_byte", "lower")

    def __init__(self) -> None:
        self._text: EvaluationText | None = None
        self._document_of: list[int] = []
        self._sizes: list[np.ndarray] = []  # bytes of each token that a window predicts
        self._context = 0

    def requests(self, context: TaskContext) -> list[ScoreRequest]:
        data = context.data or context.own_data
        if data is None:
            raise InputError(
                "task bpb: no data given; name a token set with held-out documents, or text files, with --data"
            )
        if context.shots is not None:
            raise InputError(
                f"--shots: found {context.shots}, but bpb reads plain text and takes no examples; leave it out"
            )
        self._text = open_texts(data, context.tokenizer, context.limit)
        self._context = context.context_length
        requests = []
        for number, document in enumerate(self._text.documents):
            for window in windows(document, context.tokenizer.eos_id, context.context_length):
                requests.append(ScoreRequest(window))
                self._sizes.append(context.tokenizer.token_bytes[window[1:]])
                self._document_of.append(number)
        return requests

    def measure(self, found: Sequence[Score]) -> dict[str, Any]:
        assert self._text is not None
        bits = np.zeros(len(self._text.documents))
        for number, answer in zip(self._document_of, found, strict=True):
            bits[number] -= answer.log_probabilities.sum() / math.log(2)
        bits_per_byte, error = ratio(bits, np.array(self._text.bytes, dtype=np.float64))
        return {
            "bits_per_byte": bits_per_byte,
            "standard_error": error,
            "loss": float(bits.sum() * math.log(2) / self._text.tokens),
            "accuracy": float(np.concatenate([answer.greedy for answer in found]).mean()),
            "documents": len(self._text.documents),
            "documents_available": self._text.available,
            "rows_dropped": self._text.dropped,
            "tokens": self._text.tokens,
            "bytes": sum(self._text.bytes),
            "context": self._context,
            "data": self._text.name,
            "by_position": self._by_position(found),
            "items": [
                {"prompt": sha256(document.tobytes()).hexdigest()[:16], "bits": float(part), "bytes": size}
                for document, part, size in zip(self._text.documents, bits, self._text.bytes, strict=True)
            ],
        }

    def _by_position(self, found: Sequence[Score]) -> dict[str, dict[str, float]]:
        """Bits per byte of tokens with so many ids before them, "FIRST-LAST" from 1 on: bands as long as all before,
        the last of which ends with the context. Those with nothing in them are left out.
        """
        halves = [self._context >> power for power in reversed(range(BANDS))]
        edges = [0, *(edge for edge in halves if edge >= SHORTEST or edge == self._context)]
        bits, sizes, counts = np.zeros(len(edges)), np.zeros(len(edges)), np.zeros(len(edges), np.int64)
        for answer, part in zip(found, self._sizes, strict=True):
            band = np.searchsorted(edges, np.arange(len(part)), side="right") - 1
            np.add.at(bits, band, -answer.log_probabilities / math.log(2))
            np.add.at(sizes, band, part)
            np.add.at(counts, band, 1)
        return {
            f"{first + 1}-{last}": {"bits_per_byte": float(bits[band] / sizes[band]), "tokens": int(counts[band])}
            for band, (first, last) in enumerate(pairwise(edges))
            if sizes[band]
        }

    def lines(self, values: dict[str, Any]) -> list[str]:
        error = "n/a" if values["standard_error"] is None else f"{values['standard_error']:.4f}"
        return [
            f"bpb: {values['bits_per_byte']:.4f} bits per byte, standard error {error}; {values['loss']:.4f} nats "
            "per token",
            f"    on {values['tokens']:,} tokens, {values['bytes']:,} bytes, of {values['data']}",
            f"    {values['documents']:,} of its {values['documents_available']:,} documents",
            "    by position: "
            + ", ".join(f"{band} {part['bits_per_byte']:.4f}" for band, part in values["by_position"].items()),
        ]


def windows(document: np.ndarray, eos_id: int | None, context: int) -> list[np.ndarray]:
    """The document's ids in windows of at most `context` targets, each with the one id before it in front (EOS before
    the first).

    A tokenizer without EOS gives the first id for free. Every other id is a target exactly once.
    """
    ids = document if eos_id is None else np.concatenate([[eos_id], document])
    return [ids[start : start + context + 1] for start in range(0, len(ids) - 1, context)]


def ratio(parts: np.ndarray, sizes: np.ndarray) -> tuple[float, float | None]:
    """sum(parts) / sum(sizes), and its standard error over documents as the units that were sampled (None for a single
    one).

    Linearised ratio estimator (Cochran, Sampling Techniques, 1977, eq. 6.9 without the finite population term):
    sqrt(n / (n - 1) * sum (part - ratio * size)^2) / sum(sizes).
    """
    value, count = parts.sum() / sizes.sum(), len(parts)
    if count < 2:
        return float(value), None
    spread = math.sqrt(count / (count - 1) * float(((parts - value * sizes) ** 2).sum()))
    return float(value), spread / float(sizes.sum())
