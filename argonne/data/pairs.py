"""Rows of files to preference pairs: one prompt, a chosen and a rejected answer.

Shapes, told by the names of the fields: `prompt` with `chosen` and `rejected`, each a text or messages (which may begin
with the prompt); `chosen` and `rejected` alone, whole conversations of messages or texts with `Human:` and
`Assistant:` (HH-RLHF), whose common beginning is the prompt; ranked answers, `prompt` with `answers`, `responses` or
`completions`, each with its text and a `rank` (1 is best) or a `score` (the highest is best), of which the best and the
worst are taken; StackExchange's `question`, `response_j`, `response_k`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from argonne.data.chat import Conversation, Message
from argonne.data.conversations import BEFORE, Fault, message_of, system_of, text_of, tools_of
from argonne.prepare.texts import Refused

LISTS = ("answers", "responses", "completions", "replies")
TEXTS = ("text", "content", "answer", "response", "completion")
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True)
class Pair:
    """Two conversations with the same first turns (`context` of each), which both end with an answer."""

    chosen: Conversation
    rejected: Conversation

    @property
    def characters(self) -> int:
        return self.chosen.characters + self.rejected.characters


def parse_pair(row: Any) -> Pair | Refused:
    """The pair of a row, or the reason why there is none."""
    if isinstance(row, Refused):
        return row
    try:
        prompt, sides = _sides(row)
        tools = tuple(tools_of(row.get("tools")))
        for side in sides:
            if not side or side[0].role != "assistant" or side[-1].role != "assistant":
                raise Fault("no-answer")
            if any(turn.role == "assistant" and not turn.answer().strip() for turn in side):
                raise Fault("empty-answer")
        if sides[0] == sides[1]:
            raise Fault("chosen-is-rejected")
        if not prompt or prompt[-1].role == "system":
            raise Fault("no-prompt")
        role = ""
        for turn in prompt:
            if role not in BEFORE[turn.role]:
                raise Fault("roles-out-of-order")
            role = turn.role
        chosen, rejected = (Conversation((*prompt, *side), tools, context=len(prompt)) for side in sides)
        return Pair(chosen, rejected)
    except Fault as fault:
        return Refused(str(fault))


Sides = tuple[tuple[Message, ...], tuple[Message, ...]]


def _sides(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], Sides]:
    """(prompt, what follows it in the chosen and in the rejected conversation)."""
    if row.get("question") is not None and row.get("response_j") is not None and row.get("response_k") is not None:
        row = {"prompt": row["question"], "chosen": row["response_j"], "rejected": row["response_k"]}
    if listed := next((row[name] for name in LISTS if isinstance(row.get(name), list)), None):
        best, worst = _ranked(listed)
        row = {**row, "chosen": best, "rejected": worst}
    if row.get("chosen") is None or row.get("rejected") is None:
        raise Fault("unknown-shape")
    system = tuple(system_of(row))
    if row.get("prompt") is None:
        whole = (_turns(row["chosen"]), _turns(row["rejected"]))
        same = next(
            (number for number, (one, other) in enumerate(zip(*whole, strict=False)) if one != other),
            min(map(len, whole)),
        )
        return (*system, *whole[0][:same]), (whole[0][same:], whole[1][same:])
    asked = row["prompt"]
    prompt = (*system, *(_turns(asked) if isinstance(asked, list) else (Message("user", text_of(asked)),)))
    chosen, rejected = (_after(prompt, row[name]) for name in ("chosen", "rejected"))
    return prompt, (chosen, rejected)


def _after(prompt: tuple[Message, ...], side: Any) -> tuple[Message, ...]:
    """What a side says after the prompt, with which its messages may begin."""
    if isinstance(side, str):
        return (Message("assistant", text_of(side)),)
    turns = _turns(side)
    if turns and turns[0].role != "assistant":
        spoken = tuple(turn for turn in prompt if turn.role != "system")
        begin = next((each for each in (prompt, spoken) if turns[: len(each)] == each), None)
        if begin is None:
            raise Fault("prompt-does-not-match")
        return turns[len(begin) :]
    return turns


def _turns(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        parts = HH_TURN.split(text_of(value))
        if len(parts) < 3 or parts[0].strip():
            raise Fault("no-prompt")
        roles = {"Human": "user", "Assistant": "assistant"}
        return tuple(Message(roles[role], said.strip()) for role, said in zip(parts[1::2], parts[2::2], strict=True))
    if not isinstance(value, Sequence):
        raise Fault("unknown-shape")
    return tuple(message_of(turn) for turn in value)


def _ranked(answers: list[Any]) -> tuple[Any, Any]:
    """The best and the worst of ranked answers."""
    if not all(isinstance(answer, Mapping) for answer in answers):
        raise Fault("unknown-shape")
    for name, best_first in (("rank", False), ("score", True)):
        values = [answer.get(name) for answer in answers]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            order = sorted(range(len(answers)), key=lambda number: values[number], reverse=best_first)
            if len(answers) < 2 or values[order[0]] == values[order[-1]]:
                raise Fault("answers-of-one-rank")
            return _said(answers[order[0]]), _said(answers[order[-1]])
    raise Fault("unknown-shape")


def _said(answer: Mapping[str, Any]) -> Any:
    found = next((answer[name] for name in TEXTS if answer.get(name) is not None), None)
    if found is None:
        raise Fault("unknown-shape")
    return found
