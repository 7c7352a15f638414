"""An answer in parts: however it is cut while it streams, and back through the template to the same ids."""

from __future__ import annotations

import json
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.data.chat import ChatTemplate, Conversation, Message, ToolCall
from argonne.serve.parts import Part, Parts
from argonne.tokens.tokenizer import load_tokenizer, train_tokenizer

CALL = '<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call>'
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", CALL, "\n", "<", "{", "}", '{"name": "f"}', "a ", "ü")


def joined(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind as one part."""
    found: list[Part] = []
    for kind, group in groupby(parts, key=lambda part: part.kind):
        listed = list(group)
        found += listed if kind == "tool_call" else [Part(kind, "".join(part.text for part in listed))]
    return found


def split(text: str) -> list[Part]:
    parts = Parts()
    return joined([*parts.push(text), *parts.finish()])


def message_of(parts: list[Part]) -> Message:
    traces = [part.text for part in parts if part.kind == "reasoning"]
    return Message(
        "assistant",
        "".join(part.text for part in parts if part.kind == "text"),
        "".join(traces) if traces else None,
        tuple(ToolCall(part.name, part.arguments) for part in parts if part.kind == "tool_call"),
    )


@settings(max_examples=500)
@given(pieces=st.lists(st.sampled_from(TAGS), max_size=12), data=st.data())
def test_any_cut_of_an_answer_gives_the_same_parts(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    parts, found = Parts(), []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += parts.push(text[begin:end])
    assert joined([*found, *parts.finish()]) == split(text)


plain = st.text(alphabet='ab <>/{}"\\\n.ü🙂', max_size=20)


@given(content=plain, reasoning=st.none() | plain, calls=st.lists(st.tuples(st.sampled_from("fg"), plain), max_size=3))
def test_the_parts_of_an_answer_render_to_its_ids(
    template: ChatTemplate, content: str, reasoning: str | None, calls: list[tuple[str, str]]
) -> None:
    made = tuple(ToolCall(name, json.dumps({"x": value}, indent=len(value) % 3)) for name, value in calls)
    said = Message("assistant", content, reasoning, made)
    turns = (Message("user", "?"),)
    again = message_of(split(said.answer()))
    assert again.tool_calls == made
    assert again.reasoning == (None if reasoning is None else reasoning.strip("\n"))
    ids = template.render(Conversation((*turns, said))).ids
    assert ids.tolist() == template.render(Conversation((*turns, again))).ids.tolist()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder = train_tokenizer([CALL, "a b ü\n\n"] * 20, 320, tmp_path_factory.mktemp("tokenizer") / "bpe")
    return ChatTemplate(load_tokenizer(folder))


def test_a_trace_text_and_calls_are_told_apart() -> None:
    assert split(f"<think>\nSo.\n\nYes.\n</think>\n\nI add.\n{CALL}\n{CALL}") == [
        Part("reasoning", "So.\n\nYes."),
        Part("text", "I add."),
        Part("tool_call", name="sum", arguments='{"a": 1}', call_id="call_0"),
        Part("tool_call", name="sum", arguments='{"a": 1}', call_id="call_1"),
    ]


def test_text_that_is_no_tag_comes_out_at_once_and_no_half_tag_does() -> None:
    parts = Parts()
    told = ["".join(part.text for part in parts.push(piece)) for piece in ("a <", "b <tool", "s> <tool_call>", " hm")]
    assert told == ["a ", "<b ", "<tools> ", "<tool_call> hm"]
    parts = Parts()
    told = ["".join(part.text for part in parts.push(piece)) for piece in ("<th", "ink>\nx", "\n", "\ny</", "b>")]
    assert told == ["", "x", "", "\n\ny", "</b>"]


@pytest.mark.parametrize(
    "broken",
    [
        "<tool_call>\n{broken}\n</tool_call>",
        '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "no object"}\n</tool_call>',
        '<tool_call>\n{"name": "f"',
        "<tool_call>",
        "<tool_ca",
    ],
)
def test_what_is_no_whole_call_stays_text_as_it_stands(broken: str) -> None:
    assert split(f"a\n{broken}") == [Part("text", f"a\n{broken}")]


def test_a_call_behind_a_broken_one_counts() -> None:
    found = split(f"<tool_call>\n{{broken}}\n</tool_call>\n{CALL}")
    assert [part.kind for part in found] == ["text", "tool_call"]


def test_a_tag_that_begins_no_call_hides_none_behind_it() -> None:
    assert [part.kind for part in split(f"<tool_call>a {CALL}")] == ["text", "tool_call"]


def test_a_call_in_other_words_is_a_call() -> None:
    (found,) = split('<tool_call>{"arguments": {"ü": [1, 2]}, "name": "f"}</tool_call>\n')
    assert (found.name, found.arguments) == ("f", '{"ü": [1, 2]}')


def test_an_empty_trace_is_a_trace_and_one_that_never_ends_too() -> None:
    assert split("<think>\n\n</think>\n\nYes") == [Part("reasoning"), Part("text", "Yes")]
    assert split("<think>\nSo </thi") == [Part("reasoning", "So </thi")]


def test_think_within_an_answer_is_text() -> None:
    assert split("a <think>b</think>") == [Part("text", "a <think>b</think>")]


def test_every_answer_of_a_folder_of_tokens_can_be_split(template: ChatTemplate) -> None:
    """The tags are tokens of their own, so that none is half a token."""
    for tag in TAGS[:4]:
        assert len(template.tokenizer.encode(tag)) == 1
