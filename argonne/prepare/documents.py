"""Files of text to documents: find them, cut them into work units, read the rows of a unit.

Formats: parquet, Arrow IPC (file and stream), jsonl and plain text, packed or not. A unit is a run of row groups, of
record batches or of bytes; the cut depends on the files alone, never on who reads them. Every row that is no document
comes out with the reason.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from argonne.errors import InputError, first_line
from argonne.prepare import columnar, matching, textual
from argonne.prepare.texts import REMEDY, LongText, Refused, RowBatch, checked
from argonne.tokens.formats import natural_key

WHOLE_FILE = -1
FEW_UNITS, FILES_A_UNIT = 64, 4096


@dataclass(frozen=True, slots=True)
class InputFile:
    """One matched file. `path` is local or an fsspec URL."""

    path: str
    format: str
    bytes: int


@dataclass(frozen=True)
class Unit:
    """One piece of work: row groups, record batches or bytes `start <= i < stop` of a file, `stop` -1 to its end; or
    that file and those after it, whole, `files` in all.
    """

    index: int
    file: int
    start: int
    stop: int
    files: int = 1


def find_files(
    patterns: Sequence[str], also: Mapping[str, str] | None = None, outside: Path | None = None
) -> list[InputFile]:
    """The files that the globs match, local or fsspec, in natural order, each once, whatever links lead to it.

    A folder stands for the files of known kinds below it. `also`: more suffixes and the kind of file they stand for.
    `outside`: a folder whose files are not taken: what is being written is no input.

    Raises InputError for a pattern without a match and for a file of a format that is not known.
    """
    if not patterns:
        raise InputError("input: no pattern given, expected at least one glob of text files")
    found = {match[0]: InputFile(*match) for pattern in patterns for match in matching.matches(pattern, also)}
    once: dict[str, InputFile] = {}
    for file in sorted(found.values(), key=lambda file: natural_key(file.path)):
        once.setdefault(file.path if "://" in file.path else os.path.realpath(file.path), file)
    if outside is not None:
        inside = os.path.join(os.path.realpath(outside), "")
        once = {name: file for name, file in once.items() if not name.startswith(inside)}
        if not once:
            raise InputError(
                f"input {', '.join(patterns)}: matches only files of the output folder {outside}; choose another --out"
            )
    return list(once.values())


def not_taken(patterns: Sequence[str], outside: Path | None = None) -> Counter[str]:
    """What lies in the folders that the patterns name, not in `outside`, and is not read, by kind."""
    passed = Counter[str]()
    for pattern in patterns:
        matching.matches(pattern, None, passed, outside)
    return +passed


def unit_bytes(files: Sequence[InputFile]) -> int:
    """Target size of a unit: 64 units for a small input, 128 MiB for a large one. From the input alone, so that the cut
    never varies.
    """
    return min(128 << 20, max(1 << 20, sum(file.bytes for file in files) // FEW_UNITS))


def cut(file: InputFile, target: int, text_column: str | None) -> list[tuple[int, int]]:
    """The units of one file as (start, stop). Raises InputError when the file cannot be read or lacks the column (None:
    whole rows are wanted).
    """
    if file.format == "parquet":
        return columnar.cut_parquet(file.path, target, text_column)
    if file.format == "arrow":
        return columnar.cut_arrow(file.path, text_column, WHOLE_FILE)
    textual.open_file(file.path).close()
    if textual.is_compressed(file.path):
        if not file.bytes:
            raise InputError(f"{file.path}: 0 bytes, which is no compressed file; {REMEDY}")
        return [(0, WHOLE_FILE)]
    if file.format == "txt":
        return [(0, WHOLE_FILE)]
    count = max(1, -(-file.bytes // target))
    edges = [file.bytes * number // count for number in range(count + 1)]
    return list(itertools.pairwise(edges))


def cut_all(
    files: Sequence[InputFile], text_column: str | None, unreadable: Callable[[InputFile, InputError], None]
) -> list[Unit]:
    """The units of all files in their order. Of more than 64 files small ones that follow one another share a unit, up
    to the size that a unit aims at. `unreadable` is told of a file that cannot be read, and may raise.
    """
    target = unit_bytes(files)
    units: list[Unit] = []
    shared = 0  # bytes of the last unit, where it may take more files
    for number, file in enumerate(files):
        try:
            pieces = cut(file, target, text_column)
        except InputError as error:
            unreadable(file, error)
            continue
        last = units[-1] if units else None
        joins = last is not None and last.file + last.files == number and last.files < FILES_A_UNIT
        if last is not None and joins and shared and len(pieces) == 1 and shared + file.bytes <= target:
            units[-1] = replace(last, start=0, stop=WHOLE_FILE, files=last.files + 1)
            shared += file.bytes
            continue
        units += [Unit(len(units) + index, number, start, stop) for index, (start, stop) in enumerate(pieces)]
        shared = max(1, file.bytes) if len(pieces) == 1 and len(files) > FEW_UNITS else 0
    return units


def read_unit(file: InputFile, unit: Unit, text_column: str, split: str) -> Iterator[RowBatch]:
    """The rows of one file of a unit in bounded batches. Raises InputError naming file and row where it is damaged."""
    if file.format == "parquet":
        values = columnar.parquet_rows(file.path, unit.start, unit.stop, text_column)
    elif file.format == "arrow":
        values = columnar.arrow_rows(file.path, unit.start, unit.stop, text_column)
    elif file.format == "jsonl":
        whole = None if textual.is_compressed(file.path) else file.bytes
        stop = whole if unit.stop == WHOLE_FILE else unit.stop
        values = textual.jsonl_rows(file.path, unit.start, stop, text_column)
    else:
        values = textual.text_rows(file.path, file.bytes, split)
    batch = RowBatch()
    for value in values:
        text = checked(value)
        if isinstance(text, Refused):
            batch.drops[text.reason] += 1
            continue
        if isinstance(text, LongText) and batch.texts:
            yield batch
            batch = RowBatch()
        batch.add(text)
        del value, text
        if batch.full:
            yield batch
            batch = RowBatch()
    yield batch


def read_rows(file: InputFile, unit: Unit) -> Iterator[tuple[int, Any]]:
    """(number in the unit from 1, the row with all of its fields, or why it is none) of a unit that was cut without a
    column. Raises InputError naming the file where it is damaged.
    """
    stop = None if unit.stop == WHOLE_FILE else unit.stop
    if file.format == "jsonl":
        yield from textual.jsonl_objects(file.path, unit.start, stop)
        return
    if file.format == "txt":
        raise InputError(f"{file.path}: plain text has no fields; expected .jsonl, .parquet or .arrow")
    number = 0
    try:
        for number, row in enumerate(columnar.every_row(file.path, file.format, unit.start, stop), 1):
            yield number, row
    except columnar.faults_of(file.path) as error:
        raise InputError(
            f"{file.path}: after row {place_of(file, unit, number):,}: cannot be read ({first_line(error)}); restore it"
        ) from None


def place_of(file: InputFile, unit: Unit, number: int) -> int:
    """The line or row of the whole file, from 1, that is the `number`-th of the unit."""
    if file.format == "jsonl":
        return number + textual.lines_before(file.path, unit.start)
    return number + columnar.rows_before(file.path, file.format, unit.start)
