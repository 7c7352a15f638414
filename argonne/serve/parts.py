"""A growing answer, split into its trace, its text and its tool calls: the way back from the chat template.

Put together again as a Message they render to the answer's ids where it is written as the template writes: newlines
around a trace, the one before a call and those behind it belong to no part. What is no whole call stays text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from argonne.layout import CONTENT_TOKENS, THINK_TOKENS
from argonne.serve.text_stream import overlap

THINK, THINK_END = THINK_TOKENS
CALL, CALL_END = CONTENT_TOKENS[2:4]
WRITTEN = re.compile(r'\{"name": "([^"\\]*)", "arguments": (.*)\}', re.DOTALL)  # as the template writes a call


@dataclass(frozen=True)
class Part:
    """A piece of an answer: of its trace or its text, or a whole tool call. arguments: the text of a JSON object."""

    kind: Literal["reasoning", "text", "tool_call"]
    text: str = ""
    name: str = ""
    arguments: str = ""
    call_id: str = ""


class Parts:
    """Feed text, get what is certain. An empty trace is one part without text. prefix: of the ids of calls, which are
    numbered from 0.
    """

    def __init__(self, prefix: str = "call_") -> None:
        self._prefix, self._calls = prefix, 0
        self._held, self._within, self._traced = "", "start", False

    def push(self, text: str) -> list[Part]:
        """The parts that this text makes certain; what may become a tag is held back."""
        self._held += text
        return self._read(final=False)

    def finish(self) -> list[Part]:
        """What was still held back."""
        return self._read(final=True)

    def _read(self, *, final: bool) -> list[Part]:
        found: list[Part] = []
        before = None
        while before != (self._held, self._within):
            before = (self._held, self._within)
            waits = len(self._held) < len(THINK) and THINK.startswith(self._held)
            if self._within == "start" and (final or not waits):
                self._within = "trace" if self._held.startswith(THINK) else "text"
                self._held = self._held.removeprefix(THINK)
            elif self._within == "trace":
                found += self._trace(final)
            elif self._within == "behind":  # a trace or a call
                self._held = self._held.lstrip("\n")
                self._within = "text" if self._held else "behind"
            elif self._within == "text":
                found += self._text(final)
        return found

    def _trace(self, final: bool) -> list[Part]:
        if not self._traced:
            self._held = self._held.lstrip("\n")
        trace, closed, rest = self._held.partition(THINK_END)
        if not closed:
            trace = trace if final else trace[: len(trace) - overlap(trace, THINK_END)]
        trace = trace.rstrip("\n")
        self._held = rest if closed or final else self._held[len(trace) :]
        self._within = "behind" if closed else "trace"
        empty = bool(closed) and not self._traced
        self._traced = self._traced or bool(trace)
        return [Part("reasoning", trace)] if trace or empty else []

    def _text(self, final: bool) -> list[Part]:
        """The text up to a call, and the call if it is whole."""
        place = self._held.find(CALL)
        if place < 0:
            return self._tell(
                len(self._held) - (0 if final else max(overlap(self._held, t) for t in (CALL, f"\n{CALL}")))
            )
        behind = place + len(CALL)
        if not re.match(r"\s*(\{|\Z)", self._held[behind:]):
            return self._tell(behind)  # what follows begins no call
        end = self._held.find(CALL_END, behind)
        if end < 0 and not final:
            return self._tell(place - self._held.endswith("\n", 0, place))
        call = _called(self._held[behind:end].strip()) if end >= 0 else None
        if call is None:  # text as it stands, up to where another call may begin
            return self._tell(end + len(CALL_END) if end >= 0 else behind)
        told = self._tell(place - self._held.endswith("\n", 0, place))
        self._held, self._within = self._held.partition(CALL_END)[2], "behind"
        part = Part("tool_call", name=call[0], arguments=call[1], call_id=f"{self._prefix}{self._calls}")
        self._calls += 1
        return [*told, part]

    def _tell(self, size: int) -> list[Part]:
        told, self._held = self._held[:size], self._held[size:]
        return [Part("text", told)] if told else []


def _called(text: str) -> tuple[str, str] | None:
    """(name, arguments) of a call; the arguments as they are written, where the rest is as the template writes it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    found = WRITTEN.fullmatch(text)
    if found and set(value) == {"name", "arguments"} and _same(found[2], arguments):
        return value["name"], found[2]
    return value["name"], json.dumps(arguments, ensure_ascii=False)


def _same(text: str, value: object) -> bool:
    try:
        return bool(json.loads(text) == value)
    except ValueError:
        return False
