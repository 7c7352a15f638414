"""Generated sums, differences and word problems: endless, and with worked steps of a form that a small model learns.

Training and evaluation never meet: a problem's two numbers decide by a hash on which side it falls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Any

import numpy as np

from argonne.evaluate.gsm8k import Answer, WordProblems, answer_of, last_number
from argonne.evaluate.probes import trace_of
from argonne.evaluate.requests import TaskContext

KINDS = {"sum": 0.5, "difference": 0.3, "word": 0.2}
UNSEEN = 10  # one of so many pairs of numbers is kept for evaluation
SENTENCE = "The answer is {}."
QUESTIONS = 500
PLACES = ("ones", "tens", "hundreds", "thousands")
NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Lea")
THINGS = ("apples", "books", "coins", "cards", "pens", "stones")
MORE = ("buys {b} more", "gets {b} more", "finds {b} more")
LESS = ("gives away {b}", "loses {b}", "sells {b}")


@dataclass(frozen=True)
class Problem:
    """left and right of a sum (sign 1) or a difference (sign -1, left not the smaller)."""

    kind: str
    question: str
    left: int
    right: int
    sign: int

    @property
    def result(self) -> int:
        return self.left + self.sign * self.right

    @property
    def steps(self) -> str:
        """Place by place, from the ones, with carry or borrow; then the result."""
        lines, carry = [f"{self.left}{'+' if self.sign > 0 else '-'}{self.right}"], 0
        for place in range(len(str(self.left if self.sign < 0 else max(self.left, self.right)))):
            a, b = (number // 10**place % 10 for number in (self.left, self.right))
            used = f"{'+' if self.sign > 0 else '-'}{carry}" if carry else ""
            if self.sign > 0:
                found = a + b + carry
                carry, told = found // 10, f" carry {found // 10}" if found > 9 else ""
                lines.append(f"{PLACES[place]} {a}+{b}{used}={found}{told}")
            else:
                found = a - b - carry
                borrow = int(found < 0)
                shown = f"1{a}" if borrow else f"{a}"
                lines.append(f"{PLACES[place]} {shown}-{b}{used}={found + 10 * borrow}{' borrow 1' if borrow else ''}")
                carry = borrow
        if carry and self.sign > 0:
            lines.append(f"{PLACES[len(str(max(self.left, self.right)))]} {carry}")
        return "\n".join([*lines, f"= {self.result}"])


def problems(seed: int, *, unseen: bool) -> Iterator[Problem]:
    """Endless problems of numbers 10 .. 999, of those kept for evaluation or of the others."""
    draw = Random(seed)
    while True:
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        a, b = draw.randint(10, 999), draw.randint(10, 999)
        if is_unseen(a, b) != unseen:
            continue
        sign = 1 if kind == "sum" else -1 if kind == "difference" else draw.choice((1, -1))
        if sign < 0:
            a, b = max(a, b), min(a, b)
        if kind == "word":
            name, thing = draw.choice(NAMES), draw.choice(THINGS)
            event = draw.choice(MORE if sign > 0 else LESS).format(b=b)
            question = f"{name} has {a} {thing} and {event}. How many {thing} does {name} have?"
        else:
            question = f"What is {a} {'+' if sign > 0 else '-'} {b}?"
        yield Problem(kind, question, a, b, sign)


def is_unseen(*parts: object) -> bool:
    """Whether a problem of these numbers or words, in any order, is kept for evaluation."""
    digest = hashlib.blake2b(",".join(sorted(map(str, parts))).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % UNSEEN == 0


class Sums(WordProblems):
    """Exact match on `--limit` (500) unseen generated problems."""

    name = "sums"

    def problems(self, context: TaskContext) -> list[tuple[str, Decimal]]:
        made = problems(0, unseen=True)
        return [
            (one.question, Decimal(one.result)) for one, _ in zip(made, range(context.limit or QUESTIONS), strict=False)
        ]

    def details(self, texts: Sequence[str], right: Sequence[Answer]) -> dict[str, Any]:
        """Shares of the answers: a trace that is closed and not empty, one whose last number is the answer's, and the
        answer in a sentence.
        """
        traces = [trace_of(text) for text in texts]
        return {
            "closed": float(np.mean([kind == "closed" for _, kind, _ in traces])),
            "consistent": float(
                np.mean(
                    [
                        kind == "closed" and last_number(thought or "") == answer_of(text) is not None
                        for text, (thought, kind, _) in zip(texts, traces, strict=True)
                    ]
                )
            ),
            "sentences": float(np.mean([words.strip().startswith("The answer is ") for _, _, words in traces])),
        }

    def lines(self, values: dict[str, Any]) -> list[str]:
        return [
            *super().lines(values),
            f"    {values['closed']:.1%} think and close it, the last result is the answer in "
            f"{values['consistent']:.1%}; {values['sentences']:.1%} answer in a sentence",
        ]
