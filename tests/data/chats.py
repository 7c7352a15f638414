"""Conversations drawn by hypothesis, tokenizers to render them with, and the same as transformers sees them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import strategies as st

from argonne.data.chat import Conversation, Message, Rendered, ToolCall

PIECES = [
    *(
        "hello",
        " world",
        "\n",
        "\n\n",
        "  ",
        "Zürich",
        "你好",
        "🦙",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "42",
        "'s",
    ),
    *("<|endoftext|>", "{", "ASSISTANT:", "e\u0301"),
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), min_size=1, max_size=6).map("".join)
CALLS = st.lists(st.builds(ToolCall, st.sampled_from(["add", "find"]), st.just('{"a": 1}')), max_size=2).map(tuple)


@st.composite
def conversations(draw: st.DrawFn, tools: bool = True, texts: st.SearchStrategy[str] = TEXTS) -> Conversation:
    """system?, then questions, each with tool calls in between, and answers with traces of either kind or none."""
    turns = [Message("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Message("user", draw(texts)))
        for _ in range(draw(st.integers(0, 1)) if tools else 0):
            calls = draw(CALLS) or (ToolCall("add", "{}"),)
            turns.append(Message("assistant", draw(st.just("") | texts), draw(st.none() | texts), calls))
            turns.extend(Message("tool", draw(texts)) for _ in range(draw(st.integers(1, 2))))
        inline = f"<think>\n{draw(texts)}\n</think>\n\n" if draw(st.booleans()) else ""
        turns.append(Message("assistant", inline + draw(texts), None if inline else draw(st.none() | texts)))
    listed = ('{"name": "add"}',) if tools and draw(st.booleans()) else ()
    return Conversation(tuple(turns), listed)


def as_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """What apply_chat_template takes."""
    found = []
    for turn in conversation.messages:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.reasoning is not None:
            message["reasoning_content"] = turn.reasoning
        if turn.tool_calls:
            listed = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in turn.tool_calls]
            message["tool_calls"] = [{"type": "function", "function": call} for call in listed]
        found.append(message)
    return found


def as_tools(conversation: Conversation) -> list[dict[str, Any]] | None:
    return [json.loads(tool) for tool in conversation.tools] or None


def spans(rendered: Rendered) -> list[np.ndarray]:
    """The runs of trained tokens, one an answer."""
    edges = np.flatnonzero(np.diff(rendered.trained, prepend=False, append=False))
    return [rendered.ids[start:stop] for start, stop in edges.reshape(-1, 2)]
