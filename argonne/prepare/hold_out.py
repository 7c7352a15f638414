"""What is never trained on: by a hash of the text alone, so that equal texts fall on one side in every set; of few
documents the end of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any, overload

import numpy as np

from argonne.prepare.texts import FileBytes, LongText, Text

BY_HASH, BY_CUT, BY_PLACE = "hash", "cut", "position"
FEWEST_EXPECTED, MOST_COUNTED = 5, 10_000
LOOK_BACK_BYTES = 4096


def rule_for(share: float, documents: Iterable[int]) -> str | None:
    """How a share is held out of input whose parts have so many documents each: "cut" where fewer than five are
    expected to fall, "hash" otherwise, None where nothing is held out. At most 10,000 are counted.
    """
    if not share:
        return None
    total, enough = 0, min(FEWEST_EXPECTED / share, MOST_COUNTED)
    for count in documents:
        total += count
        if total >= enough:
            return BY_HASH
    return BY_CUT


def rule_of(plan: Mapping[str, Any]) -> str | None:
    """How a plan holds documents out; those of version 1 do not say."""
    return (plan.get("hold_out_rule") or BY_PLACE) if plan["recipe"]["hold_out"] else None


def falls_out(low: np.ndarray, share: float) -> np.ndarray:
    """(documents,) bool: is a text held out whose hash has these low 64 bits? What a smaller share holds out, a larger
    one does too.
    """
    return low < np.uint64(min(int(share * 2**64), 2**64 - 1))


@overload
def cut(text: str, share: float) -> tuple[str, str | None]: ...
@overload
def cut(text: LongText, share: float) -> tuple[LongText, LongText | None]: ...
def cut(text: Text, share: float) -> tuple[Text, Text | None]:
    """(begin, end) of a text, the end being about `share` of its bytes and beginning behind a line feed, else behind a
    space; no end where one of them would be empty.
    """
    data = text.data if isinstance(text, LongText) else memoryview(text.encode())
    place = min(int(len(data) * (1 - share)), len(data) - 1)
    before = bytes(data[max(0, place - min(LOOK_BACK_BYTES, len(data) - place)) : place])
    back = before.rfind(b"\n")
    back = before.rfind(b" ") if back < 0 else back
    if back >= 0:
        place -= len(before) - back - 1
    while place and bytes(data[place : place + 1])[0] & 0xC0 == 0x80:  # inside a character
        place -= 1
    if not place:
        return text, None
    if isinstance(data, FileBytes):
        return LongText(data.part(0, place)), LongText(data.part(place, len(data)))
    if isinstance(text, LongText):
        return LongText(data[:place]), LongText(data[place:])
    return bytes(data[:place]).decode(), bytes(data[place:]).decode()


def places(share: float, unit: int) -> Iterator[bool]:
    """For each document of a unit in turn: is it held out? Exactly `share` of them to within one, spread evenly, with a
    start that differs by unit. The rule of plans of version 1."""
    exact = Fraction(str(share))
    begin = Fraction(int.from_bytes(hashlib.sha256(f"hold-out {unit}".encode()).digest()[:4], "little"), 1 << 32)
    total = begin
    while True:
        before, total = total, total + exact
        yield int(total) > int(before)
