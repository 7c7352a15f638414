"""What `argonne demo` teaches beside documentation: facts of single digits as text, conversations, worked answers,
pairs of answers. Generated from a seed; problems and turns that the tasks ask about are never among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from random import Random
from typing import Any

import numpy as np

from argonne.evaluate.sums import PLACES, SENTENCE, Problem, problems
from argonne.evaluate.turns import turns
from argonne.tokens.shards import TokenSet
from argonne.tokens.tokenizer import TextTokenizer

FACTS_A_DOCUMENT = 24
QUOTED_TOKENS = 160  # of a document that an answer quotes
GOES_ON = 0.25  # of the conversations have an exchange before the last one
Row = dict[str, Any]


def facts(seed: int) -> Iterator[Row]:
    """Endless documents of sums and differences of digits, with carry and borrow, and of the places of numbers."""
    draw = Random(seed)

    def fact() -> str:
        a, b, carry = draw.randrange(10), draw.randrange(10), draw.randrange(2)
        kind = draw.randrange(3)
        if kind == 0:
            found = a + b + carry
            return f"{a}+{b}{'+1' if carry else ''}={found}{' carry 1' if found > 9 else ''}"
        if kind == 1:
            found = a - b - carry
            shown = f"{'1' if found < 0 else ''}{a}-{b}{'-1' if carry else ''}"
            return f"{shown}={found % 10}{' borrow 1' if found < 0 else ''}"
        number = str(draw.randint(10, 999))
        return (
            f"{number}: {' '.join(f'{place} {digit}' for place, digit in zip(PLACES, reversed(number), strict=False))}"
        )

    while True:
        yield {"text": "\n".join(fact() for _ in range(FACTS_A_DOCUMENT))}


def quotations(tokens: TokenSet, tokenizer: TextTokenizer, seed: int) -> Iterator[tuple[str, str]]:
    """(name, beginning of its documentation) of documents that are trained on, again and again in another order."""
    ids = np.empty(tokens.train.tokens, np.int64)
    tokens.train.copy(0, ids)
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)
    draw = Random(seed)
    while True:
        for number in draw.sample(range(len(documents)), len(documents)):
            text = tokenizer.decode(documents[number][:QUOTED_TOKENS], skip_special_tokens=True)
            name = text.split("\n", 1)[0].partition("(")[0].removeprefix("class ").strip()
            if name and len(name) < 60 and text.strip() != name:
                yield name, text.strip()


def thought(trace: str, answer: str) -> str:
    return f"<think>\n{trace}\n</think>\n{answer}"


def worded(problem: Problem, draw: Random) -> str:
    """The result, alone or in a sentence: one time of two."""
    return SENTENCE.format(problem.result) if draw.random() < 0.5 else str(problem.result)


def conversations(
    quoted: Iterable[tuple[str, str]], counts: Sequence[int], seed: int, *, thinking: bool
) -> Iterator[Row]:
    """Small talk, documentation and problems, so many of each as counts say; some go on from another exchange. Where
    thinking, each answer has its thought: the worked steps of a problem, what is meant by a turn.
    """
    draw = Random(seed)

    def answered(trace: str, answer: str) -> str:
        return thought(trace, answer) if thinking else answer

    talk, documentation, sums = counts
    short = [(one.said, answered(one.meant, one.answer)) for one in islice(turns(seed, unseen=False), talk)]
    short += [
        (one.question, answered(one.steps, worded(one, draw))) for one in islice(problems(seed, unseen=False), sums)
    ]
    told = [
        (f"What is {name}?", answered(f"documentation of {name}", text)) for name, text in islice(quoted, documentation)
    ]
    for last in (*short, *told):
        earlier = [draw.choice(short)] if draw.random() < GOES_ON else []
        yield {
            "messages": [
                {"role": role, "content": text}
                for exchange in (*earlier, last)
                for role, text in zip(("user", "assistant"), exchange, strict=True)
            ]
        }


def pair_rows(count: int, seed: int) -> list[Row]:
    """Pairs that differ in the wording alone: the result in a sentence is preferred."""
    return [
        {
            "prompt": one.question,
            "chosen": thought(one.steps, SENTENCE.format(one.result)),
            "rejected": thought(one.steps, str(one.result)),
        }
        for one in islice(problems(seed, unseen=False), count)
    ]
