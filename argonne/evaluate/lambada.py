"""LAMBADA (Paperno et al. 2016, arXiv 1606.06031): the last word of a passage, from its file of objects with `text`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from argonne.errors import InputError
from argonne.evaluate.choices import error_of, in_tokens
from argonne.evaluate.own_files import file_of, rows_of
from argonne.evaluate.requests import Headline, Score, ScoreRequest, TaskContext

FILES = ("lambada_test_en.jsonl", "lambada_test.jsonl")


class Lambada:
    """How often every token of the last word is the model's first choice, and the perplexity of last words."""

    name = "lambada"
    asks: Literal["scores"] = "scores"
    headline: Headline = ("accuracy", "higher")

    def __init__(self) -> None:
        self._trimmed = 0
        self._pairs: list[tuple[str, str]] = []

    @property
    def size(self) -> int:
        return len(self._pairs)

    def texts(self) -> list[tuple[str, ...]]:
        return [(before + last,) for before, last in self._pairs]

    def requests(self, context: TaskContext) -> list[ScoreRequest]:
        if context.shots:
            raise InputError(f"--shots: found {context.shots}, but {self.name} takes no examples; leave it out")
        file = file_of(self.name, FILES, context)
        passages = rows_of(self.name, file, "text", lambda number, row: str(row["text"]).rpartition(" "))
        self._pairs = [(before, f" {last}") for before, _, last in passages][: context.limit]
        requests, trimmed = in_tokens(self._pairs, context.tokenizer, context.context_length)
        self._trimmed = sum(trimmed)
        return requests

    def measure(self, found: Sequence[Score]) -> dict[str, Any]:
        right = [bool(score.greedy.all()) for score in found]
        sums = [float(score.log_probabilities.sum()) for score in found]
        items = [
            {
                "prompt": before[-200:],
                "asked": before,
                "answer": last,
                "log_probability": one,
                "correct": is_right,
            }
            for (before, last), one, is_right in zip(self._pairs, sums, right, strict=True)
        ]
        return {
            "accuracy": float(np.mean(right)),
            "standard_error": error_of(right),
            "correct": sum(right),
            "questions": len(right),
            "perplexity": math.exp(-float(np.mean(sums))),
            "trimmed": self._trimmed,
            "items": items,
        }

    def lines(self, values: dict[str, Any]) -> list[str]:
        error = "" if values["standard_error"] is None else f" ± {values['standard_error']:.4f}"
        return [
            f"lambada: accuracy {values['accuracy']:.4f}{error}  ({values['correct']:,} of {values['questions']:,}); "
            f"perplexity {values['perplexity']:.2f}"
        ]
