"""What a client sends, read field by field: what is missing, of another type, out of bounds or unknown is named."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

Given = TypeVar("Given")


class ApiError(Exception):
    """What a client is told instead of an answer; each API writes it in its own shape. retry_after: seconds."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after


def wrong(where: str, found: object, expected: str) -> ApiError:
    """The error of a field."""
    shown = repr(found)
    return ApiError(400, f"{where}: found {shown[:60]}{'…' * (len(shown) > 60)}, expected {expected}", param=where)


class Fields:
    """A JSON object. Each read takes a field away, `end` refuses those that are left; null is as good as absent."""

    def __init__(self, value: object, where: str = "") -> None:
        if not isinstance(value, Mapping):
            raise wrong(where or "the body", value, "a JSON object")
        self.where = where
        self._left: dict[str, object] = {name: inner for name, inner in value.items() if inner is not None}

    def path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def take(self, name: str) -> object:
        """The value, whatever it is."""
        return self._left.pop(name, None)

    def _typed(self, name: str, kind: type[Given], expected: str) -> Given | None:
        value = self.take(name)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise wrong(self.path(name), value, expected)
        return value

    def text(self, name: str, choices: Sequence[str] = ()) -> str | None:
        value = self._typed(name, str, "a text")
        if value is not None and choices and value not in choices:
            raise wrong(self.path(name), value, " or ".join(map(repr, choices)))
        return value

    def needed(self, name: str, choices: Sequence[str] = ()) -> str:
        value = self.text(name, choices)
        if value is None:
            raise ApiError(400, f"{self.path(name)}: is missing", param=self.path(name))
        return value

    def flag(self, name: str) -> bool:
        return self._typed(name, bool, "true or false") or False

    def whole(self, name: str, least: int, most: int) -> int | None:
        value = self._typed(name, int, "a whole number")
        if value is not None and not least <= value <= most:
            raise wrong(self.path(name), value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float, least: float, most: float = math.inf) -> float:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            bounds = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
            raise wrong(self.path(name), value, f"a number {bounds}")
        if not abs(value) <= 1e300:
            raise wrong(self.path(name), value, "a finite number")
        return float(value)

    def listed(self, name: str) -> list[object] | None:
        return self._typed(name, list, "a list")

    def table(self, name: str) -> Fields | None:
        value = self.take(name)
        return None if value is None else Fields(value, self.path(name))

    def tables(self, name: str) -> list[Fields]:
        """The objects of a list, each with its place in its name."""
        found = self.listed(name) or []
        return [Fields(value, f"{self.path(name)}[{place}]") for place, value in enumerate(found)]

    def rest(self) -> dict[str, object]:
        """What was not read yet; it counts as read."""
        left, self._left = self._left, {}
        return left

    def ignored(self, *names: str) -> None:
        """Fields that change nothing about an answer here."""
        for name in names:
            self.take(name)

    def only(self, name: str, values: Sequence[object], why: str) -> None:
        """A field of a feature that is not there: no other value than these."""
        value = self.take(name)
        if value is not None and not any(value == known and type(value) is type(known) for known in values):
            raise ApiError(400, f"{self.path(name)}: {why}", param=self.path(name), code="unsupported_parameter")

    def end(self) -> None:
        for name in self._left:
            shown = self.path(name)[:80]
            raise ApiError(400, f"{shown}: is not known here", param=shown, code="unknown_parameter")
