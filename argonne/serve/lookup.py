"""Guessing how an answer goes on from what stands in it and in its prompt (prompt lookup decoding, Saxena 2023). The
model checks a guess in one pass; where it is right, several tokens came for the price of a few.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GRAM = 3  # so many tokens must have stood there before
MOST = 8
PAUSE = 8  # tokens without a guess after one that was wrong from its first token on


class Lookup:
    """Guesses about one answer. How long they are follows from how far the last one was right."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # the place behind the last time that a gram was seen
        self._size, self._resume = MOST // 2, 0
        self.add(prompt)

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if len(self._tokens) >= GRAM:
                self._behind[tuple(self._tokens[-GRAM:])] = len(self._tokens)
            self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """What may come next, at most so many tokens; often nothing."""
        place = self._behind.get(tuple(self._tokens[-GRAM:]))
        if place is None or len(self._tokens) < self._resume:
            return []
        return self._tokens[place : place + max(0, min(self._size, most))]

    def was_right(self, guessed: int, right: int) -> None:
        """So many of the guessed tokens came true."""
        self._size = min(MOST, 2 * guessed) if right == guessed else max(1, right)
        if right == 0:
            self._resume = len(self._tokens) + PAUSE
