"""What the demo teaches: right facts, conversations that the stages take, and nothing that is asked later."""

from __future__ import annotations

import re
from itertools import islice, repeat

from argonne.data.conversations import fault_of_trace, parse_row
from argonne.data.pairs import parse_pair
from argonne.evaluate.sums import is_unseen, problems
from argonne.evaluate.turns import turns
from argonne.prepare.texts import Refused
from argonne.stages import lessons

QUOTED = list(repeat(("json.dumps", "json.dumps(obj)\n\nSerialize."), 40))


def test_every_fact_is_right() -> None:
    counted = 0
    for row in islice(lessons.facts(1), 40):
        for line in row["text"].splitlines():
            if found := re.fullmatch(r"(\d+)([+-])(\d)(?:[+-](1))?=(\d+)(?: (carry|borrow) 1)?", line):
                a, sign, b, more, result, told = found.groups()
                side = 1 if sign == "+" else -1
                assert int(a) + side * (int(b) + int(more or 0)) == int(result)
                assert bool(told) == (int(result) > 9 if side == 1 else len(a) == 2)
                counted += 1
            else:
                number, _, places = line.partition(": ")
                assert "".join(reversed(re.findall(r"\d", places))) == number
    assert counted > 400


def test_conversations_are_whole_and_never_about_what_is_asked_later() -> None:
    asked = {one.question for one in islice(problems(0, unseen=True), 500)}
    asked |= {turn.said for turn in islice(turns(0, unseen=True), 200)}
    plain, thinking = (list(lessons.conversations(QUOTED, (50, 20, 50), seed, thinking=seed == 4)) for seed in (3, 4))
    assert (len(plain), len(thinking)) == (120, 120)
    for row in plain + thinking:
        found = parse_row(row)
        assert not isinstance(found, Refused)
        assert not {message.content for message in found.messages} & asked
        assert all((fault_of_trace(turn) is None) == (row in thinking) for turn in found.messages[1::2])
    assert 15 < sum(len(row["messages"]) == 4 for row in plain) < 50


def test_half_of_the_worked_answers_stand_in_a_sentence() -> None:
    rows = lessons.conversations([], (0, 0, 400), 5, thinking=True)
    told = sum("The answer is" in row["messages"][-1]["content"] for row in rows)
    assert 160 < told < 240


def test_a_pair_differs_in_its_wording_alone() -> None:
    for row in lessons.pair_rows(50, 6):
        assert not isinstance(parse_pair(row), Refused)
        steps, _, chosen = row["chosen"].rpartition("\n")
        assert row["rejected"].startswith(f"{steps}\n")
        assert chosen == f"The answer is {row['rejected'].removeprefix(steps).strip()}."
        assert not is_unseen(*re.findall(r"\d+", row["prompt"]))
