"""The tasks by name. A new one is a class with `requests` and `measure` in a module of its own, and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from argonne.errors import InputError
from argonne.evaluate.benchmarks import BENCHMARKS
from argonne.evaluate.bits_per_byte import BitsPerByte
from argonne.evaluate.gsm8k import WordProblems
from argonne.evaluate.gsm8k_base import BaseProblems
from argonne.evaluate.lambada import Lambada
from argonne.evaluate.mmlu import Mmlu
from argonne.evaluate.probes import Probes
from argonne.evaluate.requests import Task
from argonne.evaluate.sums import Sums
from argonne.evaluate.turns import Turns


def tasks() -> dict[str, Callable[[], Task]]:
    own: dict[str, Callable[[], Task]] = {
        "bpb": BitsPerByte,
        "gsm8k": WordProblems,
        "gsm8k_base": BaseProblems,
        "sums": Sums,
        "turns": Turns,
        "probes": Probes,
    }
    return own | {"mmlu": Mmlu, **BENCHMARKS, "lambada": Lambada}


def make_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names. Raises InputError with the nearest name for an unknown one."""
    known = tasks()
    if not names:
        raise InputError(f"--tasks: none given, expected some of {', '.join(known)}")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"--tasks: no task {name!r}; {hint}known: {', '.join(known)}")
    return [known[name]() for name in dict.fromkeys(names)]
