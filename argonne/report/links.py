"""What a link of the chain behind an artifact says: what was verified, what was not and why, and what is not as it was
recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SHORT = 12  # characters of a fingerprint that are shown


@dataclass
class Link:
    """One thing of the chain. `verified` names what was compared and agrees, `not_checked` the rest with the reason."""

    what: str
    name: str
    verified: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def compare(self, what: str, found: Any, recorded: Any, by: str) -> None:
        """Note that something is, or is not, what `by` recorded; nothing where that recorded nothing."""
        if recorded is None:
            return
        if found == recorded:
            self.verified.append(f"{what} {shown(found)} as {by} says")
        else:
            self.problems.append(f"{self.name}: {what} is {shown(found)}, but {shown(recorded)} as {by} says")

    def line(self) -> str:
        """What a person reads of it."""
        parts = [f"verified: {', '.join(self.verified)}"] if self.verified else []
        parts += [f"not checked: {', '.join(self.not_checked)}"] if self.not_checked else []
        parts += [f"PROBLEM: {problem}" for problem in self.problems]
        return f"{self.what} {self.name}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Recorded:
    """What something later in the chain wrote down of a model. `by`: that thing. `own`: the model is the very one whose
    chain is asked for, not one that it began with.
    """

    by: str = ""
    run_id: str | None = None
    step: int | None = None
    tokens: int | None = None
    weights: str | None = None
    tokenizer: str | None = None
    own: bool = True


def shown(value: Any) -> str:
    """A fingerprint by its beginning, a number with commas."""
    if isinstance(value, int):
        return f"{value:,}"
    return value[:SHORT] if isinstance(value, str) and len(value) == 64 else "missing" if value is None else str(value)
