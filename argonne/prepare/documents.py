"""Files of text to documents: find them, cut them into work units, read the rows of a unit.

Formats: parquet, Arrow IPC (file and stream), jsonl (.gz, .zst), plain text. A unit is a run of row groups, of record
batches or of bytes; the cut depends on the files alone, never on who reads them. Every row that is no document comes
out with the reason.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.errors import InputError, NothingMatches, first_line
from argonne.prepare import columnar, textual
from argonne.prepare.texts import REMEDY, LongText, Refused, RowBatch, checked
from argonne.tokens.formats import KINDS, format_of, natural_key

JSON_HINT = (
    "; one JSON object a line: rename it to .jsonl; one array: `jq -c '.[]' FILE.json > FILE.jsonl`, or "
    "datasets.load_dataset('json', data_files=...).to_parquet(...)"
)
WHOLE_FILE = -1


@dataclass(frozen=True)
class InputFile:
    """One matched file. `path` is local or an fsspec URL."""

    path: str
    format: str
    bytes: int


@dataclass(frozen=True)
class Unit:
    """One piece of work: row groups, record batches or bytes `start <= i < stop` of a file; `stop` -1
    means to its end.
    """

    index: int
    file: int
    start: int
    stop: int


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
    found = {file.path: file for pattern in patterns for file in _matches(pattern, also)}
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


def _matches(pattern: str, also: Mapping[str, str] | None) -> Iterator[InputFile]:
    import fsspec

    if not pattern.strip():
        raise InputError("input '': an empty pattern, expected a file, a folder or a glob")
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        names = [path] if not re.search(r"[*?\[]", path) or system.exists(path) else sorted(system.glob(path))
        folders = [name for name in names if system.isdir(name)]
        below = {name: [file for file in system.find(name) if format_of(file, also)] for name in folders}
        matches = [
            file for name in names for file in (below[name] if name in below else [name] if system.exists(name) else [])
        ]
        sizes = {name: system.size(name) for name in matches}
    except Exception as error:  # every kind of remote system has errors of its own
        raise InputError(
            f"input {pattern!r}: cannot be listed ({first_line(error)}); check the address and your access to it"
        ) from None
    if not matches:
        where = f", only folders without one ({KINDS}) in them" if folders else ""
        raise NothingMatches(
            f"input {pattern!r}: matches no file{where}; check the folder, the pattern and that you may read it"
        )
    local = "file" in (system.protocol if isinstance(system.protocol, tuple | list) else (system.protocol,))
    for name in matches:
        full = name if local else system.unstrip_protocol(name)
        kind = format_of(name, also)
        if kind is None:
            hint = JSON_HINT if name.lower().endswith(".json") else ""
            raise InputError(f"input {full}: unknown kind of file, expected {KINDS}{hint}")
        if sizes[name] is None:
            raise InputError(f"input {full}: the server does not say how large it is; download it first")
        yield InputFile(full, kind, int(sizes[name]))


def unit_bytes(files: Sequence[InputFile]) -> int:
    """Target size of a unit: 64 units for a small input, 128 MiB for a large one. From the input alone, so that the cut
    never varies.
    """
    return min(128 << 20, max(1 << 20, sum(file.bytes for file in files) // 64))


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


def read_unit(file: InputFile, unit: Unit, text_column: str, split: str) -> Iterator[RowBatch]:
    """The rows of one unit in bounded batches. Raises InputError naming file and row where the file is damaged."""
    if file.format == "parquet":
        values = columnar.parquet_rows(file.path, unit.start, unit.stop, text_column)
    elif file.format == "arrow":
        values = columnar.arrow_rows(file.path, unit.start, unit.stop, text_column)
    elif file.format == "jsonl":
        values = textual.jsonl_rows(file.path, unit.start, None if unit.stop == WHOLE_FILE else unit.stop, text_column)
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
