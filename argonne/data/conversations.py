"""Rows of files to conversations, whatever shape they have; what is none carries its reason.

Shapes, told by the names of the fields: `messages` (UltraChat's `prompt` beside it says the same), ShareGPT's
`conversations` (`from` and `value`), `prompt` with `completion`, Alpaca's `instruction`, `input`, `output`; functions
in `tools`. Null fields of parquet and Arrow, whose rows must all have the same ones, count as absent, also inside tools
and arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from argonne.data.chat import THINK, THINK_END, Conversation, Message, ToolCall
from argonne.prepare.texts import Refused

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
}
BEFORE = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
TRACE_FIELDS = ("reasoning_content", "reasoning", "thinking")
ADVICE = {
    "unknown-shape": "a row needs `messages`, `conversations`, `prompt` and `completion`, or `instruction` and "
    "`output`",
    "roles-out-of-order": "a system message may begin, then users and assistants take turns; results of tools follow "
    "an assistant",
    "unknown-role": f"roles are {', '.join(ROLES)}",
    "too-long": "raise data.sequence_length, or choose another chat.too_long",
    "chosen-is-rejected": "a pair needs two different answers",
    "prompt-does-not-match": "messages of chosen and rejected begin with the prompt, or with the answer",
    "no-prompt": "give `prompt`, or conversations that begin alike",
    "answers-of-one-rank": "ranked answers need a best and a worst one",
    "no-think": "an answer needs one <think>...</think> before its text",
    "tools-in-plain-template": 'use chat.template = "chatml"',
}


class Fault(Exception):
    """Why a row is no conversation, or no pair of them."""


def parse_row(row: Any) -> Conversation | Refused:
    """The conversation of a row, its turns in an order that the template knows, or the reason why there is none."""
    if isinstance(row, Refused):
        return row
    try:
        messages = tuple(_messages(row))
        role = ""
        for turn in messages:
            if role not in BEFORE[turn.role]:
                raise Fault("roles-out-of-order")
            role = turn.role
        return Conversation(messages, tuple(tools_of(row.get("tools"))))
    except Fault as fault:
        return Refused(str(fault))


def up_to_last_answer(conversation: Conversation) -> Conversation | Refused:
    """The conversation without the turns that nothing answers, or why there is nothing to train in it."""
    turns = conversation.messages
    last = max((number for number, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if last < 0:
        return Refused("no-answer")
    if any(turn.role == "assistant" and not turn.answer().strip() for turn in turns):
        return Refused("empty-answer")
    return Conversation(turns[: last + 1], conversation.tools)


def fault_of_trace(turn: Message) -> str | None:
    """What is wrong with an answer that must hold one closed trace, then text or a tool call."""
    text = turn.answer()
    begins, ends = text.count(THINK), text.count(THINK_END)
    if not begins and not ends:
        return "no-think"
    if begins > ends:
        return "unclosed-think"
    before, _, after = text.partition(THINK_END)
    if (begins, ends) != (1, 1) or not before.lstrip().startswith(THINK):
        return "misplaced-think"
    if not before.partition(THINK)[2].strip():
        return "empty-think"
    return None if after.strip() else "nothing-after-think"


def _messages(row: Mapping[str, Any]) -> list[Message]:
    for name in ("messages", "conversations", "conversation"):
        if isinstance(row.get(name), Sequence) and not isinstance(row[name], str):
            return system_of(row) + [message_of(turn) for turn in row[name] if not _says_nothing(turn)]
    if row.get("prompt") is not None and row.get("completion") is not None:
        sides = (("user", row["prompt"]), ("assistant", row["completion"]))
        return [
            turn
            for role, side in sides
            for turn in (map(message_of, side) if isinstance(side, list) else [Message(role, text_of(side))])
        ]
    if row.get("instruction") is not None and row.get("output") is not None:
        asked = [text_of(row["instruction"]), text_of(row.get("input") or "")]
        question = Message("user", "\n\n".join(part for part in asked if part))
        return [*system_of(row), question, Message("assistant", text_of(row["output"]))]
    raise Fault("unknown-shape")


def system_of(row: Mapping[str, Any]) -> list[Message]:
    return [Message("system", text_of(row["system"]))] if row.get("system") else []


def _says_nothing(turn: Any) -> bool:
    """An empty system prompt, which many collections have in every row."""
    return isinstance(turn, Mapping) and turn.get("role", turn.get("from")) == "system" and not _content(turn)


def message_of(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise Fault("unknown-shape")
    said = turn.get("role") or turn.get("from")
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise Fault("unknown-role")
    if said == "function_call":
        return Message(role, "", None, (_tool_call(_parsed(_content(turn))),))
    content = _content(turn)
    trace = next((turn[name] for name in TRACE_FIELDS if turn.get(name)), None)
    calls = _parsed(turn.get("tool_calls") or [])
    if role == "user" and not content:
        raise Fault("empty-question")
    if not isinstance(calls, list):
        raise Fault("broken-tool-call")
    return Message(role, content, None if trace is None else text_of(trace), tuple(map(_tool_call, calls)))


def _content(turn: Mapping[str, Any]) -> str:
    """The text of a turn; parts of the kind "text" are joined."""
    content = next((turn[name] for name in ("content", "value") if turn.get(name) is not None), "")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(text_of(part.get("text")) for part in content)
    return text_of(content)


def text_of(value: Any) -> str:
    if not isinstance(value, str):
        raise Fault("not-text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Fault("invalid-utf8") from None
    return value


def _tool_call(call: Any) -> ToolCall:
    """From {name, arguments} or {function: {name, arguments}}; arguments are an object or the text of one, which stays
    as it is.
    """
    inner = (call.get("function") or call) if isinstance(call, Mapping) else {}
    arguments = inner.get("arguments") or {}
    if not isinstance(inner.get("name"), str) or not isinstance(_parsed(arguments), Mapping):
        raise Fault("broken-tool-call")
    return ToolCall(text_of(inner["name"]), text_of(arguments) if isinstance(arguments, str) else _json(arguments))


def tools_of(tools: Any) -> list[str]:
    tools = _parsed(tools or [])
    if not isinstance(tools, list) or not all(isinstance(_parsed(tool), Mapping) for tool in tools):
        raise Fault("broken-tools")
    return [_json(_parsed(tool)) for tool in tools]


def _parsed(value: Any) -> Any:
    """What a JSON text says; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _json(value: Any) -> str:
    """As the `tojson` of chat templates writes it."""
    return text_of(json.dumps(value, ensure_ascii=False))


def without_nulls(value: Any) -> Any:
    """A row of a table without the fields that are null."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value
