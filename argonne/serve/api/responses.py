"""POST /v1/responses: OpenAI's newer API. Nothing is stored: each request carries its conversation."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from argonne.serve.api.answered import Answered, Block, collected, frame, new_id, openai_error, prompt_tokens
from argonne.serve.api.asked import (
    Served,
    constraints_of,
    conversation_of,
    function_of,
    model_of,
    prompt_of,
    sampling_of,
)
from argonne.serve.api.chat import IGNORED, chosen_tools, schema_of
from argonne.serve.api.fields import ApiError, Fields, wrong
from argonne.serve.service import Request, Ticket

STATE = "no conversation is stored here; send its turns as input"


class ResponsesWork:
    """Raises ApiError for what is not understood."""

    def __init__(self, fields: Fields, models: Mapping[str, Served]) -> None:
        self.served = model_of(fields, models)
        stops = self.served.chat.stop_ids
        self._asked: dict[str, object] = {"instructions": fields.text("instructions")}
        tools: list[dict[str, Any]] = []
        for tool in fields.tables("tools"):
            tool.needed("type", ("function",))
            tools.append(function_of(tool))
        self._asked["tools"] = [{**tool["function"], "type": "function"} for tool in tools]
        turns = _turns_of(fields.take("input"))
        if self._asked["instructions"]:
            turns.insert(0, {"role": "system", "content": self._asked["instructions"]})
        conversation = conversation_of(turns, tools if chosen_tools(fields) else [], "input")
        prompt = prompt_of(self.served, conversation, "input")
        self._most = fields.whole("max_output_tokens", 1, 2**31)
        options = sampling_of(fields, self.served, [prompt], self._most)
        form = _form_of(fields.table("text"))
        self.stream = fields.flag("stream")
        for name, why in (("previous_response_id", STATE), ("conversation", STATE), ("prompt", STATE)):
            fields.only(name, (), why)
        fields.only("background", (False,), "an answer is made while its client waits; leave it out")
        fields.only("include", ([],), "nothing more can be included; leave it out")
        fields.only("truncation", ("disabled",), "nothing is left out of a conversation; shorten it")
        fields.only("reasoning", (), "a model thinks as it was trained to; leave it out")
        fields.only("top_logprobs", (0,), "is not there; use chat completions")
        fields.only("store", (False,), STATE)
        fields.ignored(*IGNORED, "stream_options")
        fields.end()
        constraints = constraints_of(self.served, form, stops, 1, chat=True)
        self.request = Request([prompt], options, stops, constraints=constraints)
        self._id, self._created = new_id("resp_"), int(time.time())

    def _response(self, answer: Answered) -> dict[str, object]:
        usage = None
        if answer.stop is not None:
            prompt, said = prompt_tokens(self.request), len(answer.ids)
            usage = {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": said,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + said,
            }
        cut = answer.stop in ("length", "context")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if answer.stop is None else "incomplete" if cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            **self._asked,
            "max_output_tokens": self._most,
            "model": self.served.name,
            "output": [_item(block, "incomplete" if cut else "completed") for block in answer.blocks],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": self.request.options.temperature,
            "tool_choice": "auto",
            "top_p": self.request.options.top_p,
            "truncation": "disabled",
            "usage": usage,
        }

    async def whole(self, ticket: Ticket) -> dict[str, object]:
        return self._response((await collected(ticket))[0])

    async def events(self, ticket: Ticket) -> AsyncIterator[str]:
        self._sent, answer, opened = 0, Answered(), 0
        yield self._event("response.created", response=self._response(answer))
        yield self._event("response.in_progress", response=self._response(answer))
        async for piece in ticket:
            for block, text in answer.push(piece):
                if len(answer.blocks) > opened and answer.blocks[opened] is block:
                    if opened:
                        for event in self._closed(answer.blocks[opened - 1], opened - 1, "completed"):
                            yield event
                    for event in self._opened(block, opened):
                        yield event
                    opened += 1
                yield self._more(block, text, opened - 1)
        cut = answer.stop in ("length", "context")
        if opened:
            for event in self._closed(answer.blocks[-1], opened - 1, "incomplete" if cut else "completed"):
                yield event
        kind = "response.incomplete" if cut else "response.completed"
        yield self._event(kind, response=self._response(answer))

    def failed(self, error: ApiError) -> str:
        told = openai_error(error)["error"]
        assert isinstance(told, dict)
        return self._event("error", code=told["code"] or told["type"], message=error.message, param=error.param)

    def _event(self, kind: str, **more: object) -> str:
        number, self._sent = self._sent, self._sent + 1
        return frame({"type": kind, "sequence_number": number, **more}, kind)

    def _opened(self, block: Block, place: int) -> list[str]:
        empty: dict[str, object] = {"arguments": ""} if block.kind == "tool_call" else {"content": []}
        item = {**_item(block, "in_progress"), **empty}
        found = [self._event("response.output_item.added", output_index=place, item=item)]
        if block.kind != "tool_call":
            where = {"item_id": _item_id(block), "output_index": place, "content_index": 0}
            found.append(self._event("response.content_part.added", **where, part=_part(block, "")))
        return found

    def _more(self, block: Block, text: str, place: int) -> str:
        where: dict[str, object] = {"item_id": _item_id(block), "output_index": place}
        if block.kind == "tool_call":
            return self._event("response.function_call_arguments.delta", **where, delta=block.arguments)
        if block.kind == "reasoning":
            return self._event("response.reasoning_text.delta", **where, content_index=0, delta=text)
        return self._event("response.output_text.delta", **where, content_index=0, delta=text, logprobs=[])

    def _closed(self, block: Block, place: int, status: str) -> list[str]:
        where: dict[str, object] = {"item_id": _item_id(block), "output_index": place}
        if block.kind == "tool_call":
            told = {"name": block.name, "arguments": block.arguments}
            found = [self._event("response.function_call_arguments.done", **where, **told)]
        else:
            where["content_index"] = 0
            kind = "reasoning" if block.kind == "reasoning" else "output"
            more: dict[str, object] = {} if block.kind == "reasoning" else {"logprobs": []}
            found = [
                self._event(f"response.{kind}_text.done", **where, text=block.text, **more),
                self._event("response.content_part.done", **where, part=_part(block, block.text)),
            ]
        item = _item(block, status)
        return [*found, self._event("response.output_item.done", output_index=place, item=item)]


def _item_id(block: Block) -> str:
    return {"reasoning": "rs_", "text": "msg_", "tool_call": "fc_"}[block.kind] + block.id


def _part(block: Block, text: str) -> dict[str, object]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(block: Block, status: str) -> dict[str, object]:
    head: dict[str, object] = {"id": _item_id(block), "status": status}
    if block.kind == "tool_call":
        call = {"call_id": block.id, "name": block.name, "arguments": block.arguments}
        return {**head, "type": "function_call", **call}
    if block.kind == "reasoning":
        return {**head, "type": "reasoning", "summary": [], "content": [_part(block, block.text)]}
    return {**head, "type": "message", "role": "assistant", "content": [_part(block, block.text)]}


# ------------------------------------------------------------------------------------------------- what is asked


def _form_of(fields: Fields | None) -> dict[str, object] | None:
    table = None if fields is None else fields.table("format")
    if fields is not None:
        fields.end()
    if table is None:
        return None
    kind = table.needed("type", ("text", "json_object", "json_schema"))
    if kind == "json_schema":
        return {"type": kind, "schema": schema_of(table)}
    table.end()
    return None if kind == "text" else {"type": kind}


def _turns_of(value: object) -> list[object]:
    """The input as chat completions write turns. What an assistant thought, said and called after one another is one
    turn.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise wrong("input", value, "a text or a list of items")
    found: list[dict[str, object]] = []
    for place, one in enumerate(value):
        item = Fields(one, f"input[{place}]")
        kind = item.text("type", ("message", "reasoning", "function_call", "function_call_output")) or "message"
        item.ignored("id", "status", "phase")
        role = item.needed("role", ("user", "assistant", "system", "developer")) if kind == "message" else "assistant"
        if kind == "function_call_output":
            item.needed("call_id")
            found.append({"role": "tool", "content": _texts_of(item, "output")})
        elif role != "assistant":
            found.append({"role": role, "content": _texts_of(item, "content")})
        else:
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []})
            _add(item, kind, found[-1])
        item.end()
    return list(found)


def _add(item: Fields, kind: str, turn: dict[str, Any]) -> None:
    """What an assistant said, thought or called, to its turn."""
    if kind == "message":
        turn["content"] += _texts_of(item, "content")
    elif kind == "reasoning":
        turn["reasoning_content"] += _texts_of(item, "content")
        item.ignored("summary", "encrypted_content")
    else:
        item.needed("call_id")
        turn["tool_calls"].append({"name": item.needed("name"), "arguments": item.needed("arguments")})


def _texts_of(item: Fields, name: str) -> str:
    """A text, or the texts of a list of parts, joined."""
    value = item.take(name)
    if isinstance(value, str):
        return value
    texts = []
    for place, one in enumerate(value if isinstance(value, list) else []):
        part = Fields(one, f"{item.path(name)}[{place}]")
        part.needed("type", ("input_text", "output_text", "text", "reasoning_text"))
        texts.append(part.needed("text"))
        part.ignored("annotations", "logprobs")
        part.end()
    if value is not None and not isinstance(value, list):
        raise wrong(item.path(name), value, "a text or a list of parts")
    return "".join(texts)
