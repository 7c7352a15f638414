"""The own files of benchmarks: where `--data` has them, and what their rows hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from argonne.errors import InputError
from argonne.evaluate.probes import read_lines
from argonne.evaluate.requests import TaskContext

Made = TypeVar("Made")


def data_of(name: str, context: TaskContext) -> Path:
    """What --data names for a benchmark: its folder (or file), or a folder that holds one of its name. Raises
    InputError where nothing is there.
    """
    if context.data is None:
        raise InputError(f"task {name}: no data given; name the folder of its own files with --data")
    path = Path(context.data)
    if not path.exists():
        raise InputError(f"--data {path}: no such file or folder; give the one with {name}'s own files")
    return path / name if (path / name).exists() else path


def file_of(name: str, files: Sequence[str], context: TaskContext) -> Path:
    """The first of a benchmark's files that is there. Raises InputError where none is."""
    path = data_of(name, context)
    file = next((path / one for one in files if (path / one).is_file()), path)
    if not file.is_file():
        raise InputError(
            f"--data {path}: no {' or '.join(files)} in it; give {name}'s own file, or a folder that holds it"
        )
    return file


def rows_of(name: str, file: Path, needed: str, make: Callable[[int, Any], Made]) -> Iterator[Made]:
    """What `make` makes of (number from 0, object) of each line. Raises InputError, naming the line, where it cannot:
    `needed` tells what a row holds.
    """
    for number, line in enumerate(read_lines(file, f"give {name}'s own file")):
        try:
            yield make(number, json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise InputError(f"{file}:{number + 1}: expected an object with {needed}") from None
