"""Token ids to text, piece by piece, without ever showing half a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """Feed ids one by one; get the text that is certain so far.

    A character of several bytes may be spread over tokens: while the end of the text decodes to U+FFFD it is held back,
    and what a later token completes comes out whole. Each piece is decoded with the ids before it, because some
    tokenizers treat a first token otherwise.
    """

    def __init__(self, tokenizer: Decoder, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._settled = len(self._ids)
        self._start = max(0, self._settled - 4)
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that this token completes; often a word, "" while a character is incomplete."""
        self._ids.append(token)
        return self._emit(final=False)

    def finish(self) -> str:
        """What is still held back: bytes that never became a character come out as U+FFFD."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._settled])
        text = self._tokenizer.decode(self._ids[self._start :])[len(before) :]
        certain = text if final else text.rstrip(REPLACEMENT)
        piece = certain[self._shown :]
        self._shown += len(piece)
        if certain == text:
            self._start, self._settled, self._shown = self._settled, len(self._ids), 0
        return piece


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
