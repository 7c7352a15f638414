"""POST /v1/messages: Anthropic's API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping

from argonne.serve.api.answered import Answered, Block, anthropic_error, collected, frame, new_id, prompt_tokens
from argonne.serve.api.asked import (
    Served,
    conversation_of,
    function_of,
    model_of,
    prompt_of,
    sampling_of,
    stops_of,
)
from argonne.serve.api.fields import ApiError, Fields, wrong
from argonne.serve.options import Shaping
from argonne.serve.service import Request, Ticket


class MessagesWork:
    """Raises ApiError for what is not understood."""

    def __init__(self, fields: Fields, models: Mapping[str, Served]) -> None:
        self.served = model_of(fields, models)
        stops = self.served.chat.stop_ids
        turns = _turns_of(fields)
        tools = _tools_of(fields)
        prompt = prompt_of(self.served, conversation_of(turns, tools))
        most = fields.whole("max_tokens", 1, 2**31)
        if most is None:
            raise ApiError(400, "max_tokens: is missing", param="max_tokens")
        options = sampling_of(fields, self.served, [prompt], most)
        shaping = Shaping(stop=stops_of(fields, "stop_sequences"))
        self.stream = fields.flag("stream")
        if (thinking := fields.table("thinking")) is not None:  # the model thinks as it was trained to
            thinking.needed("type", ("enabled", "disabled", "adaptive"))
            thinking.whole("budget_tokens", 1, 2**31)
            thinking.end()
        fields.ignored("metadata", "service_tier")
        fields.end()
        self.request = Request([prompt], options, stops, shaping)
        self._id = new_id("msg_")

    def _message(self, answer: Answered) -> dict[str, object]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.served.name,
            "content": [_content(block) for block in answer.blocks],
            **self._end(answer),
            "usage": {"input_tokens": prompt_tokens(self.request), "output_tokens": len(answer.ids)},
        }

    def _end(self, answer: Answered) -> dict[str, object]:
        reason = None if answer.stop is None else "tool_use" if answer.calls else "end_turn"
        if answer.stop in ("length", "context"):
            reason = "max_tokens"
        elif answer.stop_text is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": answer.stop_text}

    async def whole(self, ticket: Ticket) -> dict[str, object]:
        return self._message((await collected(ticket))[0])

    async def events(self, ticket: Ticket) -> AsyncIterator[str]:
        answer = Answered()
        yield _event("message_start", message=self._message(answer))
        opened = 0
        async for piece in ticket:
            for block, text in answer.push(piece):
                place = next(place for place, one in enumerate(answer.blocks) if one is block)
                if place == opened:
                    if opened:
                        yield _event("content_block_stop", index=opened - 1)
                    yield _event("content_block_start", index=place, content_block=_beginning(block))
                    opened += 1
                yield _event("content_block_delta", index=place, delta=_delta(block, text))
        if opened:
            yield _event("content_block_stop", index=opened - 1)
        usage = {"input_tokens": prompt_tokens(self.request), "output_tokens": len(answer.ids)}
        yield _event("message_delta", delta=self._end(answer), usage=usage)
        yield _event("message_stop")

    def failed(self, error: ApiError) -> str:
        return frame(anthropic_error(error), "error")


def _event(kind: str, **more: object) -> str:
    return frame({"type": kind, **more}, kind)


def _content(block: Block) -> dict[str, object]:
    if block.kind == "tool_call":
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": json.loads(block.arguments)}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "text", "text": block.text}


def _beginning(block: Block) -> dict[str, object]:
    if block.kind == "tool_call":
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _delta(block: Block, text: str) -> dict[str, object]:
    if block.kind == "tool_call":
        return {"type": "input_json_delta", "partial_json": block.arguments}
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}


# ------------------------------------------------------------------------------------------------- what is asked


def _tools_of(fields: Fields) -> list[dict[str, object]]:
    found = []
    for tool in fields.tables("tools"):
        tool.text("type", ("custom",))
        tool.ignored("cache_control")
        found.append(function_of(tool, "input_schema"))
    choice = fields.table("tool_choice")
    if choice is None:
        return found
    kind = choice.needed("type", ("auto", "none"))
    choice.ignored("disable_parallel_tool_use")
    choice.end()
    return [] if kind == "none" else found


def _turns_of(fields: Fields) -> list[object]:
    """The messages as chat completions write them: a result of a tool is a turn of its own."""
    system = fields.take("system")
    found: list[object] = []
    if system is not None:
        found.append({"role": "system", "content": _texts_of(system, "system")})
    for message in fields.tables("messages"):
        role, content = message.needed("role", ("user", "assistant")), message.take("content")
        message.end()
        if isinstance(content, str):
            found.append({"role": role, "content": content})
        elif isinstance(content, list):
            blocks = [Fields(block, f"{message.path('content')}[{place}]") for place, block in enumerate(content)]
            found += _user(blocks) if role == "user" else _assistant(blocks)
        else:
            raise wrong(message.path("content"), content, "a text or a list of blocks")
    return found


def _texts_of(value: object, where: str) -> str:
    """A text, or blocks of text, joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(where, value, "a text or a list of blocks")
    texts = []
    for place, one in enumerate(value):
        block = Fields(one, f"{where}[{place}]")
        block.needed("type", ("text",))
        texts.append(_text_of(block))
    return "".join(texts)


def _text_of(block: Fields) -> str:
    text = block.needed("text")
    block.ignored("cache_control", "citations")
    block.end()
    return text


def _user(blocks: list[Fields]) -> list[object]:
    found: list[object] = []
    texts: list[str] = []
    for block in blocks:
        if block.needed("type", ("text", "tool_result")) == "text":
            texts.append(_text_of(block))
            continue
        block.needed("tool_use_id")
        content = block.take("content")
        found.append({"role": "tool", "content": "" if content is None else _texts_of(content, block.path("content"))})
        block.flag("is_error")
        block.ignored("cache_control")
        block.end()
    return [*found, *([{"role": "user", "content": "".join(texts)}] if texts or not found else [])]


def _assistant(blocks: list[Fields]) -> list[object]:
    texts, thoughts, calls = [], [], []
    for block in blocks:
        kind = block.needed("type", ("text", "thinking", "tool_use"))
        if kind == "text":
            texts.append(_text_of(block))
            continue
        if kind == "thinking":
            thoughts.append(block.needed("thinking"))
            block.ignored("signature")
        else:
            block.needed("id")
            given = block.table("input")
            calls.append({"name": block.needed("name"), "arguments": {} if given is None else given.rest()})
            block.ignored("cache_control")
        block.end()
    reasoning = {"reasoning_content": "".join(thoughts)} if thoughts else {}
    return [{"role": "assistant", "content": "".join(texts), "tool_calls": calls, **reasoning}]
