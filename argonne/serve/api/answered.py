"""What the APIs tell alike: an answer in blocks of reasoning, text and tool calls, usage, errors, stream frames."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from argonne.serve.api.asked import Served
from argonne.serve.api.fields import ApiError
from argonne.serve.parts import Parts
from argonne.serve.sampling import TokenLogprobs
from argonne.serve.service import Piece, Request, Ticket


class Work(Protocol):
    """A request that was understood."""

    served: Served
    request: Request
    stream: bool

    async def whole(self, ticket: Ticket) -> dict[str, object]:
        """The body of the answer."""
        ...

    def events(self, ticket: Ticket) -> AsyncIterator[str]:
        """The frames of a stream of server-sent events."""
        ...

    def failed(self, error: ApiError) -> str:
        """The frame that ends a stream which cannot go on."""
        ...


@dataclass
class Block:
    """A stretch of an answer: kind "reasoning" or "text" with its text, or "tool_call" with the rest."""

    kind: str
    text: str = ""
    name: str = ""
    arguments: str = ""
    id: str = ""


@dataclass
class Answered:
    """An answer while it grows, in blocks."""

    blocks: list[Block] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stop: str | None = None
    stop_text: str | None = None
    _parts: Parts = field(default_factory=lambda: Parts(new_id("call_")[:21] + "_"))

    def push(self, piece: Piece) -> list[tuple[Block, str]]:
        """The blocks that begin or go on, each with what is new of its text; a tool call comes whole."""
        self.ids += piece.ids
        self.logprobs += piece.logprobs
        self.stop, self.stop_text = piece.stop, piece.stop_text
        parts, found = self._parts.push(piece.text), []
        for part in [*parts, *(self._parts.finish() if piece.stop is not None else [])]:
            if part.kind == "tool_call":
                self.blocks.append(Block(part.kind, "", part.name, part.arguments, part.call_id))
            elif not part.text:
                continue
            elif not self.blocks or self.blocks[-1].kind != part.kind:
                self.blocks.append(Block(part.kind, part.text, id=new_id("")))
            else:
                self.blocks[-1].text += part.text
            found.append((self.blocks[-1], part.text))
        return found

    def text(self, kind: str) -> str:
        return "".join(block.text for block in self.blocks if block.kind == kind)

    @property
    def calls(self) -> list[Block]:
        return [block for block in self.blocks if block.kind == "tool_call"]


async def collected(ticket: Ticket) -> list[Answered]:
    """The answers of a request once the last has ended."""
    answers = [Answered() for _ in range(ticket.request.size)]
    async for piece in ticket:
        answers[piece.number].push(piece)
    return answers


def prompt_tokens(request: Request) -> int:
    return sum(map(len, request.prompts))


def usage_of(request: Request, completion_tokens: int) -> dict[str, int]:
    """As chat completions and completions count."""
    prompt = prompt_tokens(request)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt + completion_tokens,
    }


def finish_reason(stop: str | None, called: bool = False) -> str | None:
    """As chat completions and completions name it; None while the answer runs."""
    if stop is None:
        return None
    if stop in ("length", "context"):
        return "length"
    return "tool_calls" if called else "stop"


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


def frame(data: Mapping[str, object], name: str | None = None) -> str:
    """A server-sent event."""
    begin = f"event: {name}\n" if name else ""
    return f"{begin}data: {json.dumps(data, ensure_ascii=False)}\n\n"


def openai_error(error: ApiError) -> dict[str, object]:
    """The error body of OpenAI's APIs."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = {429: "rate_limit_error", 401: "authentication_error"}.get(error.status, kind)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


ANTHROPIC_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: ApiError) -> dict[str, object]:
    """The error body of Anthropic's API."""
    kind = ANTHROPIC_KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
