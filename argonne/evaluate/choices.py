"""Questions with given answers: the answer to which the model gives the largest log-probability is its choice.

Prompts, their split into tokens and the scores are those of lm-evaluation-harness, so that numbers can be set beside
published ones.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from argonne.errors import InputError
from argonne.evaluate.requests import Headline, Score, ScoreRequest, TaskContext
from argonne.tokens.tokenizer import TextTokenizer

TIE = 1e-5  # nats, under which the order of two scores is rounding


@dataclass(frozen=True)
class Question:
    """pairs: (prompt, answer) of each choice, the answer with the space before it. right: number of the right one.
    sizes: characters by which scores are divided for the second accuracy. group: what it is counted under as well.
    texts: what it says, each part by itself (argonne.evaluate.contamination).
    """

    pairs: tuple[tuple[str, str], ...]
    right: int
    sizes: tuple[int, ...]
    group: str = ""
    texts: tuple[str, ...] = ()


def asked(prompt: str, choices: Sequence[str], right: int, texts: tuple[str, ...] = ()) -> Question:
    """One prompt, and a choice behind a space each. texts: unset, the prompt with the right choice."""
    pairs = tuple((prompt, f" {choice}") for choice in choices)
    return Question(pairs, right, tuple(map(len, choices)), texts=texts or ("".join(pairs[right]),))


class MultipleChoice(ABC):
    """Accuracy, and where `normalised` that of scores a character too. `groups`: table of the groups' own names to what
    they are counted under together.
    """

    name: str
    asks: Literal["scores"] = "scores"
    headline: Headline = ("accuracy", "higher")
    normalised = True
    shots = 0  # at most

    def __init__(self) -> None:
        self._questions: list[Question] = []
        self._hashes: list[str] = []
        self._trimmed = 0

    @abstractmethod
    def questions(self, context: TaskContext) -> Iterable[Question]:
        """All questions in their published order. Raises InputError where the data is missing or damaged."""

    def together(self, group: str) -> str | None:
        """What a group is counted under with others."""
        return None

    @property
    def size(self) -> int:
        """Questions that were asked."""
        return len(self._questions)

    def texts(self) -> list[tuple[str, ...]]:
        return [question.texts for question in self._questions]

    def requests(self, context: TaskContext) -> list[ScoreRequest]:
        if context.shots is not None and not 0 <= context.shots <= self.shots:
            expected = f"0 to {self.shots}" if self.shots else "none"
            raise InputError(f"--shots: found {context.shots}, expected {expected} for {self.name}")
        self._questions = list(self.questions(context))[: context.limit]
        if not self._questions:
            raise InputError(f"task {self.name}: no question to ask; raise --limit, or give other data")
        pairs = [pair for question in self._questions for pair in question.pairs]
        requests, trimmed = in_tokens(pairs, context.tokenizer, context.context_length)
        at = 0
        for question in self._questions:
            end = at + len(question.pairs)
            self._trimmed += any(trimmed[at:end])
            digest = hashlib.sha256("\0".join(map("".join, question.pairs)).encode())
            self._hashes.append(digest.hexdigest()[:16])
            at = end
        return requests

    def measure(self, found: Sequence[Score]) -> dict[str, Any]:
        sums, at = [float(score.log_probabilities.sum()) for score in found], 0
        items = []
        for question, digest in zip(self._questions, self._hashes, strict=True):
            scores = np.array(sums[at : at + len(question.pairs)])
            at += len(question.pairs)
            best = np.sort(scores)[-2:]
            item = {
                "prompt": digest,
                "asked": question.pairs[0][0].rpartition("\n\n")[2],
                "choices": [answer for _, answer in question.pairs],
                "group": question.group,
                "scores": scores.tolist(),
                "right": question.right,
                "chosen": int(scores.argmax()),
                "close": bool(best[1] - best[0] <= TIE),
            }
            if self.normalised:
                item["chosen_by_character"] = int((scores / np.array(question.sizes)).argmax())
            items.append(item)
        values = {**self._counted(items), "trimmed": self._trimmed, "close": sum(item["close"] for item in items)}
        names = dict.fromkeys(item["group"] for item in items)
        if len(names) > 1:
            values["groups"] = {
                name: self._counted([item for item in items if item["group"] == name]) for name in names
            }
            over = dict.fromkeys(filter(None, map(self.together, names)))
            values["together"] = {
                name: self._counted([item for item in items if self.together(item["group"]) == name]) for name in over
            }
        return {**values, "items": items}

    def _counted(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        right = [item["chosen"] == item["right"] for item in items]
        values = {
            "accuracy": float(np.mean(right)),
            "standard_error": error_of(right),
            "correct": sum(right),
            "questions": len(right),
        }
        if self.normalised:
            normed = [item["chosen_by_character"] == item["right"] for item in items]
            values |= {"accuracy_by_character": float(np.mean(normed)), "standard_error_by_character": error_of(normed)}
        return values

    def lines(self, values: dict[str, Any]) -> list[str]:
        def row(name: str, part: dict[str, Any]) -> str:
            error = "" if part["standard_error"] is None else f" ± {part['standard_error']:.4f}"
            return f"{name} {part['accuracy']:.4f}{error}  ({part['correct']:,} of {part['questions']:,})"

        groups = values.get("groups", {})
        width = max(map(len, [*groups, *values.get("together", {})]), default=0)
        lines = [row(f"{self.name}: accuracy", values)]
        if self.normalised:
            lines.append(
                f"    a character: {values['accuracy_by_character']:.4f} ± {values['standard_error_by_character']:.4f}"
                if values["standard_error_by_character"] is not None
                else f"    a character: {values['accuracy_by_character']:.4f}"
            )
        if values["trimmed"]:
            lines.append(
                f"    {values['trimmed']:,} questions are longer than the context: their beginnings are cut off"
            )
        if values["close"]:
            lines.append(f"    {values['close']:,} questions whose two best scores lie within {TIE:g}")
        for part in (groups, values.get("together", {})):
            lines += [row(f"    {name:{width}}", found) for name, found in part.items()]
        return lines


def error_of(right: Sequence[bool]) -> float | None:
    """Standard error of a share of n: sqrt(p (1 - p) / (n - 1)); None for a single one."""
    n, p = len(right), float(np.mean(right))
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def in_tokens(
    pairs: Sequence[tuple[str, str]], tokenizer: TextTokenizer, context: int
) -> tuple[list[ScoreRequest], list[bool]]:
    """A request for each (prompt, answer): ids of both together, scored from where those of the prompt alone end;
    spaces at the end of a prompt belong to the answer. Too long ones lose their beginning; which those were.
    """
    moved = [(prompt.rstrip(), prompt[len(prompt.rstrip()) :] + answer) for prompt, answer in pairs]
    prompts = {prompt: len(ids) for prompt, ids in _encoded([prompt for prompt, _ in moved], tokenizer).items()}
    wholes = _encoded([prompt + answer for prompt, answer in moved], tokenizer)
    requests, trimmed = [], []
    for prompt, answer in moved:
        ids = wholes[prompt + answer]
        start = max(1, min(prompts[prompt], len(ids) - 1))
        excess = max(0, len(ids) - (context + 1))
        trimmed.append(excess > 0)
        requests.append(ScoreRequest(ids[excess:], max(1, start - excess)))
    return requests, trimmed


def _encoded(texts: Sequence[str], tokenizer: TextTokenizer) -> dict[str, np.ndarray]:
    once = list(dict.fromkeys(texts))
    return {text: np.asarray(ids, np.int64) for text, ids in zip(once, tokenizer.encode_batch(once), strict=True)}
