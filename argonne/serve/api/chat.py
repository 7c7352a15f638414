"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping

from argonne.serve.api.answered import (
    Answered,
    Block,
    collected,
    finish_reason,
    frame,
    new_id,
    openai_error,
    usage_of,
)
from argonne.serve.api.asked import (
    MOST_COPIES,
    Served,
    bias_of,
    constraints_of,
    conversation_of,
    function_of,
    model_of,
    prompt_of,
    sampling_of,
    stops_of,
)
from argonne.serve.api.fields import ApiError, Fields
from argonne.serve.options import MOST_LOGPROBS, Shaping
from argonne.serve.sampling import TokenLogprobs
from argonne.serve.service import Request, Ticket

# Fields that say who asks, or how OpenAI's own servers go about it.
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls")


class ChatWork:
    """Raises ApiError for what is not understood."""

    def __init__(self, fields: Fields, models: Mapping[str, Served]) -> None:
        self.served = model_of(fields, models)
        template = self.served.chat
        tools = tools_of_chat(fields)
        conversation = conversation_of(fields.listed("messages") or [], tools)
        prompt = prompt_of(self.served, conversation)
        most = fields.whole("max_completion_tokens", 1, 2**31)
        older = fields.whole("max_tokens", 1, 2**31)
        options = sampling_of(fields, self.served, [prompt], most or older)
        count = fields.whole("n", 1, MOST_COPIES) or 1
        shaping = Shaping(_logprobs_of(fields), bias_of(fields, self.served), stops_of(fields, "stop"))
        form = form_of(fields.table("response_format"))
        self.stream = fields.flag("stream")
        self.include_usage = include_usage(fields)
        no_such_penalty(fields)
        fields.only("store", (False,), "nothing is stored here; leave it out")
        fields.only("modalities", (["text"],), "only text is made here; leave it out")
        fields.ignored(*IGNORED)
        fields.end()
        constraints = constraints_of(self.served, form, template.stop_ids, count, chat=True)
        self.request = Request([prompt], options, template.stop_ids, shaping, count, constraints)
        self._head: dict[str, object] = {"id": new_id("chatcmpl-"), "created": int(time.time())}

    async def whole(self, ticket: Ticket) -> dict[str, object]:
        answers = await collected(ticket)
        return {
            **self._head,
            "object": "chat.completion",
            "model": self.served.name,
            "choices": [self._choice(number, answer) for number, answer in enumerate(answers)],
            "usage": usage_of(self.request, sum(len(answer.ids) for answer in answers)),
        }

    def _choice(self, number: int, answer: Answered) -> dict[str, object]:
        content = answer.text("text")
        message: dict[str, object] = {
            "role": "assistant",
            "content": content if content or not answer.calls else None,
            "refusal": None,
        }
        if reasoning := answer.text("reasoning"):
            message["reasoning_content"] = reasoning
        if answer.calls:
            message["tool_calls"] = [_call(block) for block in answer.calls]
        return {
            "index": number,
            "message": message,
            "logprobs": self._logprobs(answer.ids, answer.logprobs),
            "finish_reason": finish_reason(answer.stop, bool(answer.calls)),
        }

    def _logprobs(self, ids: list[int], found: list[TokenLogprobs]) -> dict[str, object] | None:
        if self.request.shaping.logprobs is None:
            return None
        listed = []
        for token, one in zip(ids, found, strict=True):
            likeliest = [self._token(other, value) for other, value in one.likeliest]
            listed.append({**self._token(token, one.chosen), "top_logprobs": likeliest})
        return {"content": listed, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, object]:
        raw = self.served.bytes_of(token)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    async def events(self, ticket: Ticket) -> AsyncIterator[str]:
        answers = [Answered() for _ in range(self.request.size)]
        for number in range(self.request.size):
            yield self._chunk(number, {"role": "assistant", "content": ""})
        async for piece in ticket:
            number, answer = piece.number, answers[piece.number]
            deltas = [_delta(answer, block, text) for block, text in answer.push(piece)]
            logprobs = self._logprobs(list(piece.ids), list(piece.logprobs)) if piece.ids else None
            if logprobs and not deltas:
                deltas.append({})
            for place, delta in enumerate(deltas):
                yield self._chunk(number, delta, None if place else logprobs)
            if piece.stop is not None:
                yield self._chunk(number, {}, None, finish_reason(piece.stop, bool(answer.calls)))
        if self.include_usage:
            usage = usage_of(self.request, sum(len(answer.ids) for answer in answers))
            yield frame({**self._chunk_head, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def failed(self, error: ApiError) -> str:
        return frame(openai_error(error))

    @property
    def _chunk_head(self) -> dict[str, object]:
        return {**self._head, "object": "chat.completion.chunk", "model": self.served.name}

    def _chunk(
        self, number: int, delta: dict[str, object], logprobs: object = None, finished: str | None = None
    ) -> str:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finished}
        usage = {"usage": None} if self.include_usage else {}
        return frame({**self._chunk_head, "choices": [choice], **usage})


def _call(block: Block) -> dict[str, object]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.arguments}}


def _delta(answer: Answered, block: Block, text: str) -> dict[str, object]:
    if block.kind == "tool_call":
        return {"tool_calls": [{"index": answer.calls.index(block), **_call(block)}]}
    return {"reasoning_content" if block.kind == "reasoning" else "content": text}


def _logprobs_of(fields: Fields) -> int | None:
    wanted, likeliest = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    if likeliest is not None and not wanted:
        raise ApiError(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
    return (likeliest or 0) if wanted else None


def tools_of_chat(fields: Fields) -> list[dict[str, object]]:
    """The functions that the model is shown."""
    found = []
    for tool in fields.tables("tools"):
        tool.needed("type", ("function",))
        function = tool.table("function")
        if function is None:
            raise ApiError(400, f"{tool.path('function')}: is missing", param=tool.path("function"))
        tool.end()
        found.append(function_of(function))
    return found if chosen_tools(fields) else []


def chosen_tools(fields: Fields) -> bool:
    """May the model call a function? It cannot be made to."""
    choice = fields.take("tool_choice")
    if choice not in (None, "auto", "none"):
        raise ApiError(
            400, "tool_choice: only 'auto' and 'none' are known here", param="tool_choice", code="unsupported_parameter"
        )
    return choice != "none"


def form_of(fields: Fields | None) -> dict[str, object] | None:
    """A `response_format` as `constraint_of` takes it; None for text of any form."""
    if fields is None:
        return None
    kind = fields.needed("type", ("text", "json_object", "json_schema", "regex", "choice"))
    spec: dict[str, object] = {"type": kind}
    if kind == "json_schema":
        table = fields.table("json_schema")
        if table is None:
            raise ApiError(400, f"{fields.path('json_schema')}: is missing", param=fields.path("json_schema"))
        spec["schema"] = schema_of(table)
    elif kind == "regex":
        spec["pattern"] = fields.needed("pattern")
    elif kind == "choice":
        choices = fields.listed("choices")
        if not choices or not all(isinstance(text, str) and text for text in choices):
            raise ApiError(400, f"{fields.path('choices')}: expected a list of texts", param=fields.path("choices"))
        spec["choices"] = choices
    fields.end()
    return None if kind == "text" else spec


def schema_of(table: Fields) -> dict[str, object]:
    """The schema of a table that names it."""
    table.text("name")
    table.text("description")
    table.flag("strict")
    schema = table.table("schema")
    table.end()
    return {} if schema is None else schema.rest()


def include_usage(fields: Fields) -> bool:
    table = fields.table("stream_options")
    if table is None:
        return False
    wanted = table.flag("include_usage")
    table.ignored("include_obfuscation")
    table.end()
    return wanted


def no_such_penalty(fields: Fields) -> None:
    for name in ("frequency_penalty", "presence_penalty"):
        fields.only(name, (0, 0.0), "is not there; use repetition_penalty")
