"""What `argonne demo` teaches beside documentation: facts of single digits as text, conversations, worked answers,
pairs of answers. Generated from a seed; problems and turns that the tasks ask about are never among them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from argonne import files
from argonne.evaluate.sums import PLACES, SENTENCE, Problem, problems
from argonne.evaluate.turns import turns
from argonne.tokens.shards import TokenSet
from argonne.tokens.tokenizer import TextTokenizer

FACTS_A_DOCUMENT = 24
QUOTED_TOKENS = 160  # of a document that an answer quotes
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


def conversation(said: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]}


def thought(trace: str, answer: str) -> str:
    return f"<think>\n{trace}\n</think>\n{answer}"


def worded(problem: Problem, draw: Random) -> str:
    """The result, alone or in a sentence: one time of two."""
    return SENTENCE.format(problem.result) if draw.random() < 0.5 else str(problem.result)


def chat_rows(quoted: Iterable[tuple[str, str]], counts: Sequence[int], seed: int) -> list[Row]:
    """Conversations without thoughts. counts: small talk, documentation, results said at once."""
    draw = Random(seed)
    rows = [conversation(turn.said, turn.answer) for turn in islice(turns(seed, unseen=False), counts[0])]
    rows += [conversation(f"What is {name}?", text) for name, text in islice(quoted, counts[1])]
    rows += [conversation(one.question, worded(one, draw)) for one in islice(problems(seed, unseen=False), counts[2])]
    return rows


def thought_rows(quoted: Iterable[tuple[str, str]], counts: Sequence[int], seed: int) -> list[Row]:
    """The same with a thought before each answer: the worked steps of a problem, what is meant by a turn."""
    draw = Random(seed)
    rows = [
        conversation(turn.said, thought(turn.meant, turn.answer))
        for turn in islice(turns(seed, unseen=False), counts[0])
    ]
    rows += [
        conversation(f"What is {name}?", thought(f"documentation of {name}", text))
        for name, text in islice(quoted, counts[1])
    ]
    for one in islice(problems(seed, unseen=False), counts[2]):
        rows.append(conversation(one.question, thought(one.steps, worded(one, draw))))
    return rows


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


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
