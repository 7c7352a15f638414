"""How a recipe key, or a flag, declares all that is known of it: one line, beside the key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

# What a number may be: how it is told, and whether it holds. Any number must be finite.
BOUNDS: Mapping[str, Callable[[float], bool]] = {
    "at least 1": lambda value: value >= 1,
    "at least 0": lambda value: value >= 0,
    "more than 0": lambda value: value > 0,
    "from 0 to below 1": lambda value: 0 <= value < 1,
    "from 0 to below 0.5": lambda value: 0 <= value < 0.5,
    "from 0 to 1": lambda value: 0 <= value <= 1,
}


def key(
    default: Any,
    meaning: str,
    choices: tuple[Any, ...] = (),
    *,
    bounds: str = "",
    needs: str = "",
    changes: str = "weights",
    free: bool = False,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    zero: str = "",
) -> Any:
    """All that is known of a recipe key, or of a flag, in one line. `default` MISSING = required; choices: all it can
    be, where that is closed.

    bounds: a name of BOUNDS, for each number in it. needs: the mode in which it acts, as `argonne.keys.unmet` reads it;
    given outside of it, it is refused. changes: what another value may change ("weights", "order" of the data, "files",
    "speed", "text" of samples, "end" of the session), most first. free: it may differ on resume. metavar, parse: how a
    flag's value is called in the help, and read from its text. zero: what 0 is called in files and on the command line.
    """
    facts = {"meaning": meaning, "choices": choices, "bounds": bounds, "needs": needs, "changes": changes, "free": free}
    return field(default=default, metadata={**facts, "metavar": metavar, "parse": parse, "zero": zero})
