"""Rows of every shape become the same conversation; every other row says why it is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from argonne.data.chat import Conversation, Message, ToolCall
from argonne.data.conversations import fault_of_trace, parse_row, up_to_last_answer, without_nulls
from argonne.prepare.texts import Refused

ASKED = {"role": "user", "content": "Well?"}
ANSWER = {"role": "assistant", "content": "Yes."}
EXPECTED = Conversation((Message("user", "Well?"), Message("assistant", "Yes.")))
CALL = ToolCall("add", '{"a": 1, "b": "é"}')
ARGUMENTS = {"a": 1, "b": "é"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWER]},
        {"prompt": "Well?", "messages": [ASKED, ANSWER]},  # UltraChat
        {"conversations": [{"from": "human", "value": "Well?"}, {"from": "gpt", "value": "Yes."}]},
        {"prompt": "Well?", "completion": "Yes."},
        {"prompt": [ASKED], "completion": [ANSWER]},
        {"instruction": "Well?", "input": "", "output": "Yes."},
        {"messages": [{"role": "system", "content": ""}, ASKED, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Well?"}]}, ANSWER]},
    ],
)
def test_every_shape_is_the_same_conversation(row: dict[str, Any]) -> None:
    assert parse_row(row) == EXPECTED


def test_an_alpaca_input_follows_its_instruction() -> None:
    found = parse_row({"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."})
    assert isinstance(found, Conversation)
    assert [turn.content for turn in found.messages] == ["Be brief.", "Add.\n\n1 2", "3"]


@pytest.mark.parametrize(
    "call",
    [
        {"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}},
        {"name": "add", "arguments": ARGUMENTS},
        {"function": {"name": "add", "arguments": json.dumps(ARGUMENTS, ensure_ascii=False)}},
    ],
)
def test_a_tool_call_may_hold_an_object_or_its_text(call: dict[str, Any]) -> None:
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    found = parse_row(
        {"messages": [ASKED, asked, {"role": "tool", "content": "3"}, ANSWER], "tools": '[{"name": "add"}]'}
    )
    assert isinstance(found, Conversation)
    assert found.messages[1].tool_calls == (CALL,)
    assert found.tools == ('{"name": "add"}',)


def test_sharegpts_calls_and_observations_are_tool_calls_and_results() -> None:
    turns = [("human", "Well?"), ("function_call", json.dumps({"name": "f", "arguments": {}})), ("observation", "3")]
    found = parse_row({"conversations": [{"from": role, "value": text} for role, text in [*turns, ("gpt", "3.")]]})
    assert isinstance(found, Conversation)
    assert [turn.role for turn in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1].tool_calls == (ToolCall("f", "{}"),)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_trace_may_be_a_field_of_its_own(name: str) -> None:
    found = parse_row({"messages": [ASKED, {**ANSWER, name: "hm"}]})
    assert isinstance(found, Conversation)
    assert found.messages[1].answer() == "<think>\nhm\n</think>\n\nYes."


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("unknown-shape", {"text": "once"}),
        ("unknown-shape", {"messages": ["Well?"]}),
        ("unknown-role", {"messages": [{"role": "narrator", "content": "once"}]}),
        ("unknown-role", {"messages": [{"role": ["user"], "content": "once"}]}),
        ("roles-out-of-order", {"messages": [ANSWER, ASKED]}),
        ("roles-out-of-order", {"messages": [ASKED, ANSWER, ANSWER]}),
        ("roles-out-of-order", {"messages": [ASKED, ASKED, ANSWER]}),
        ("roles-out-of-order", {"messages": [ASKED, {"role": "tool", "content": "3"}, ANSWER]}),
        ("roles-out-of-order", {"messages": [ASKED, {"role": "system", "content": "x"}, ANSWER]}),
        ("not-text", {"messages": [{"role": "user", "content": 7}, ANSWER]}),
        ("not-text", {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}),
        ("not-text", {"prompt": 7, "completion": "x"}),
        ("invalid-utf8", {"prompt": "\ud800", "completion": "x"}),
        ("empty-question", {"messages": [{"role": "user", "content": ""}, ANSWER]}),
        ("broken-tool-call", {"messages": [ASKED, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}]}),
        ("broken-tool-call", {"messages": [ASKED, {**ANSWER, "tool_calls": {"name": "f"}}]}),
        ("broken-tools", {"messages": [ASKED, ANSWER], "tools": "{"}),
        ("invalid-json", Refused("invalid-json")),
    ],
)
def test_a_row_that_is_no_conversation_says_why(reason: str, row: Any) -> None:
    assert parse_row(row) == Refused(reason)


@pytest.mark.parametrize(
    ("reason", "turns"),
    [("no-answer", (Message("user", "x"),)), ("empty-answer", (Message("user", "x"), Message("assistant", " \n")))],
)
def test_a_conversation_without_an_answer_says_so(reason: str, turns: tuple[Message, ...]) -> None:
    assert up_to_last_answer(Conversation(turns)) == Refused(reason)


def test_turns_that_nothing_answers_are_left_out() -> None:
    assert up_to_last_answer(Conversation((*EXPECTED.messages, Message("user", "And?")))) == EXPECTED


@pytest.mark.parametrize(
    ("fault", "content"),
    [
        (None, "<think>\nhm\n</think>\n\nYes."),
        ("no-think", "Yes."),
        ("unclosed-think", "<think>\nhm"),
        ("misplaced-think", "Yes. <think>hm</think> Yes."),
        ("misplaced-think", "<think>a</think><think>b</think>Yes."),
        ("misplaced-think", "hm</think>Yes."),
        ("empty-think", "<think>\n\n</think>\n\nYes."),
        ("nothing-after-think", "<think>hm</think>\n"),
    ],
)
def test_a_trace_is_closed_and_followed_by_text(fault: str | None, content: str) -> None:
    assert fault_of_trace(Message("assistant", content)) == fault


def test_a_trace_may_be_followed_by_a_tool_call() -> None:
    assert fault_of_trace(Message("assistant", "", "hm", (CALL,))) is None


def test_nulls_of_a_table_are_absent() -> None:
    call = {"name": "f", "arguments": {"a": 1, "b": None}}
    row = {"messages": [ASKED, {**ANSWER, "tool_calls": [call]}], "prompt": None, "tools": None}
    found = parse_row(without_nulls(row))
    assert isinstance(found, Conversation)
    assert found.messages[1].tool_calls == (ToolCall("f", '{"a": 1}'),)
