"""Preference rows of every shape to one pair, and what is none told by its reason."""

from __future__ import annotations

from typing import Any

import pytest

from argonne.data.pairs import Pair, parse_pair
from argonne.prepare.texts import Refused

USER, GOOD, BAD = {"role": "user", "content": "Why?"}, "Because.", "Dunno."


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SHAPES: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Why?", "chosen": GOOD, "rejected": BAD},
    "messages": {"prompt": [USER], "chosen": [said("assistant", GOOD)], "rejected": [said("assistant", BAD)]},
    "prompt said again": {
        "prompt": "Why?",
        "chosen": [USER, said("assistant", GOOD)],
        "rejected": [USER, said("assistant", BAD)],
    },
    "prompt in both": {"chosen": [USER, said("assistant", GOOD)], "rejected": [USER, said("assistant", BAD)]},
    "sharegpt": {
        "chosen": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": GOOD}],
        "rejected": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": BAD}],
    },
    "hh-rlhf": {
        "chosen": f"\n\nHuman: Why?\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: Why?\n\nAssistant: {BAD}",
    },
    "ranks": {
        "prompt": "Why?",
        "answers": [{"text": BAD, "rank": 2}, {"text": "So.", "rank": 1}, {"text": GOOD, "rank": 0}],
    },
    "scores": {"prompt": [USER], "responses": [{"content": GOOD, "score": 9.5}, {"content": BAD, "score": 1}]},
    "stackexchange": {"question": "Why?", "response_j": GOOD, "response_k": BAD},
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_the_same_pair(name: str) -> None:
    found = parse_pair(SHAPES[name])
    assert isinstance(found, Pair), found
    for side, answer in ((found.chosen, GOOD), (found.rejected, BAD)):
        assert [(turn.role, turn.content) for turn in side.messages] == [("user", "Why?"), ("assistant", answer)]
        assert side.context == 1


def test_the_prompt_of_two_conversations_is_all_that_they_begin_with() -> None:
    begin = [said("system", "Be kind."), USER, said("assistant", "Ask again."), said("user", "Why now?")]
    row = {"chosen": [*begin, said("assistant", GOOD)], "rejected": [*begin, said("assistant", BAD)]}
    found = parse_pair(row)
    assert isinstance(found, Pair)
    assert found.chosen.context == found.rejected.context == 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Why?", "chosen": GOOD, "rejected": GOOD}, "chosen-is-rejected"),
        ({"prompt": "Why?", "chosen": "", "rejected": BAD}, "empty-answer"),
        ({"prompt": "Why?", "chosen": GOOD}, "unknown-shape"),
        ({"chosen": GOOD, "rejected": BAD}, "no-prompt"),
        ({"prompt": "Who?", "chosen": [USER, said("assistant", GOOD)], "rejected": BAD}, "prompt-does-not-match"),
        (
            {"chosen": [USER, said("assistant", GOOD)], "rejected": [said("user", "Who?"), said("assistant", BAD)]},
            "no-answer",
        ),
        ({"prompt": [USER], "chosen": [USER], "rejected": BAD}, "no-answer"),
        ({"prompt": "Why?", "answers": [{"text": GOOD, "rank": 1}, {"text": BAD, "rank": 1}]}, "answers-of-one-rank"),
        ({"prompt": "Why?", "answers": [{"text": GOOD}, {"text": BAD}]}, "unknown-shape"),
        ({"prompt": [said("assistant", "Hm.")], "chosen": GOOD, "rejected": BAD}, "roles-out-of-order"),
        ({"prompt": 3, "chosen": GOOD, "rejected": BAD}, "not-text"),
    ],
)
def test_what_is_no_pair_is_told_by_its_reason(row: dict[str, Any], reason: str) -> None:
    assert parse_pair(row) == Refused(reason)
