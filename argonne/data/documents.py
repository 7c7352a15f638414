"""Files of text to documents: find them, cut them into work units, read the rows of a unit.

Formats: parquet, Arrow IPC (file and stream), jsonl (.gz, .zst), plain text. A unit is a run of row groups, of record batches or of
bytes; the cut depends on the files alone, never on who reads them. Every row that is no document comes out with the reason.
"""

from __future__ import annotations

import io
import itertools
import json
import mmap
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from argonne.data.texts import LONG_CHARACTERS, READ_BYTES, LongText, Refused, RowBatch, checked
from argonne.errors import InputError

SUFFIXES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json.gz": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
    ".txt.gz": "txt",
    ".txt.zst": "txt",
    ".md": "txt",
}
WHOLE_FILE = -1
LONG_SEPARATOR = 1 << 12
ARROW_BYTES = 8 << 20


@dataclass(frozen=True)
class InputFile:
    """One matched file. `path` is local or an fsspec URL."""

    path: str
    format: str
    bytes: int


@dataclass(frozen=True)
class Unit:
    """One piece of work: row groups, record batches or bytes `start <= i < stop` of a file; `stop` -1 means to its end."""

    index: int
    file: int
    start: int
    stop: int


def natural_key(path: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `shard_2` before `shard_10`; equal numbers written differently keep a fixed order."""
    pieces = re.split(r"(\d+)", path)
    return [(0, int(piece), piece) if piece.isdigit() and piece.isascii() else (1, 0, piece) for piece in pieces]


def find_files(patterns: Sequence[str], also: Mapping[str, str] | None = None) -> list[InputFile]:
    """The files that the globs match, local or fsspec, in natural order, each once.

    `also`: more suffixes and the kind of file they stand for.

    Raises InputError for a pattern without a match and for a file of a format that is not known.
    """
    import fsspec

    if not patterns:
        raise InputError("input: no pattern given, expected at least one glob of text files")
    found: dict[str, InputFile] = {}
    for pattern in patterns:
        system, path = fsspec.core.url_to_fs(pattern)
        if system.isdir(path):
            matches = [name for name in system.find(path) if format_of(name, also)]
        else:
            matches = (
                [name for name in system.glob(path) if not system.isdir(name)]
                if re.search(r"[*?\[]", path)
                else [path] * system.exists(path)
            )
        if not matches:
            raise InputError(f"input {pattern!r}: matches no file; check the folder and the pattern")
        for name in matches:
            local = "file" in (system.protocol if isinstance(system.protocol, tuple | list) else (system.protocol,))
            full = name if local else system.unstrip_protocol(name)
            kind = format_of(name, also)
            if kind is None:
                raise InputError(f"input {full}: unknown kind of file, expected one of {', '.join(SUFFIXES)}")
            found[full] = InputFile(full, kind, int(system.size(name)))
    return sorted(found.values(), key=lambda file: natural_key(file.path))


def format_of(path: str, also: Mapping[str, str] | None = None) -> str | None:
    name = path.rsplit("/", 1)[-1].lower()
    return next((kind for suffix, kind in {**SUFFIXES, **(also or {})}.items() if name.endswith(suffix)), None)


def _is_compressed(path: str) -> bool:
    return path.lower().endswith((".gz", ".zst"))


def open_file(path: str) -> IO[bytes]:
    """The file's bytes, decompressed. Raises InputError when it cannot be opened."""
    import fsspec

    try:
        raw: IO[bytes] = fsspec.open(path, "rb").open()
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror or error})") from None
    if path.lower().endswith(".gz"):
        import gzip

        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.lower().endswith(".zst"):
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=True), READ_BYTES)
    return raw


def damage() -> tuple[type[BaseException], ...]:
    """What the readers raise for a truncated or damaged file."""
    import zstandard

    return OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError


def unit_bytes(files: Sequence[InputFile]) -> int:
    """Target size of a unit: 64 units for a small input, 128 MiB for a large one. From the input alone, so that the cut never varies."""
    return min(128 << 20, max(1 << 20, sum(file.bytes for file in files) // 64))


def cut(file_number: int, file: InputFile, target: int, text_column: str, split: str) -> list[tuple[int, int]]:
    """The units of one file as (start, stop). Raises InputError when the file cannot be read or lacks the column."""
    if file.format == "parquet":
        return _cut_parquet(file, target, text_column)
    if file.format == "arrow":
        return _cut_arrow(file, text_column)
    if _is_compressed(file.path) or file.format == "txt":
        open_file(file.path).close()
        return [(0, WHOLE_FILE)]
    count = max(1, -(-file.bytes // target))
    edges = [file.bytes * number // count for number in range(count + 1)]
    return list(itertools.pairwise(edges))


def _parquet(file: InputFile) -> Any:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        source = fsspec.open(file.path, "rb").open() if "://" in file.path else file.path
        return parquet.ParquetFile(source, buffer_size=READ_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file.path}: not a readable parquet file ({_first_line(error)}); restore it, or pass --skip-bad-shards"
        ) from None


def _cut_parquet(file: InputFile, target: int, text_column: str) -> list[tuple[int, int]]:
    with _parquet(file) as source:
        _check_column(file, source.schema_arrow, text_column)
        units, start, size = [], 0, 0
        for group in range(source.num_row_groups):
            size += source.metadata.row_group(group).total_byte_size
            if size >= target:
                units.append((start, group + 1))
                start, size = group + 1, 0
        if start < source.num_row_groups:
            units.append((start, source.num_row_groups))
        return units


def _check_column(file: InputFile, schema: Any, text_column: str) -> None:
    import pyarrow as pa

    if text_column not in schema.names:
        raise InputError(f"{file.path}: no column {text_column!r}; it has {', '.join(schema.names)}; choose one with --text-column")
    kind = schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputError(f"{file.path}: column {text_column!r} holds {kind}, expected text; choose another with --text-column")


def _arrow_reader(file: InputFile) -> tuple[Any, bool]:
    """(reader, whether it is of the random-access file format)."""
    import fsspec
    import pyarrow as pa

    local = "://" not in file.path
    try:
        source = pa.memory_map(file.path) if local else pa.PythonFile(fsspec.open(file.path, "rb").open())
        magic = source.read(6)
        source.seek(0)
        if magic == b"ARROW1":
            return pa.ipc.open_file(source), True
        return pa.ipc.open_stream(source), False
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file.path}: not a readable Arrow file or stream ({_first_line(error)}); restore it, or pass --skip-bad-shards"
        ) from None


def _cut_arrow(file: InputFile, text_column: str) -> list[tuple[int, int]]:
    reader, random_access = _arrow_reader(file)
    _check_column(file, reader.schema, text_column)
    if not random_access:
        return [(0, WHOLE_FILE)]
    count = reader.num_record_batches
    return [(start, min(start + 64, count)) for start in range(0, count, 64)]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_unit(file: InputFile, unit: Unit, text_column: str, split: str) -> Iterator[RowBatch]:
    """The rows of one unit in bounded batches. Raises InputError naming file and row where the file is damaged."""
    if file.format == "parquet":
        rows = _parquet_rows(file, unit, text_column)
    elif file.format == "arrow":
        rows = _arrow_rows(file, unit, text_column)
    elif file.format == "jsonl":
        rows = _jsonl_rows(file, unit, text_column)
    else:
        rows = _text_rows(file, split)
    batch = RowBatch()
    for value in rows:
        text = checked(value)
        if isinstance(text, Refused):
            batch.drop(text.reason)
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


def _column_values(column: Any) -> Iterator[Any]:
    """Values of an Arrow column: text, None, or bytes for what is long or not UTF-8."""
    import pyarrow as pa

    if column.nbytes < 4 * LONG_CHARACTERS:
        try:
            yield from column.to_pylist()
            return
        except UnicodeDecodeError:
            pass
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        column = column.cast(pa.large_string())
    yield from _views(column, pa.types.is_large_string(column.type))


def _views(column: Any, large: bool) -> Iterator[memoryview | None]:
    """The bytes of each value, not copied: one value may be a good part of the memory there is."""
    import numpy as np

    _, ends, data = column.buffers()
    edges = np.frombuffer(ends, dtype=np.int64 if large else np.int32)[column.offset : column.offset + len(column) + 1].tolist()
    whole = memoryview(b"" if data is None else data)
    for number, valid in enumerate(column.is_valid().to_pylist()):
        yield whole[edges[number] : edges[number + 1]] if valid else None


def _parquet_rows(file: InputFile, unit: Unit, text_column: str) -> Iterator[Any]:
    import pyarrow as pa

    row = 0
    with _parquet(file) as source:
        groups = list(range(unit.start, unit.stop))
        column = source.schema_arrow.names.index(text_column)
        metadata = [source.metadata.row_group(group) for group in groups]
        size = sum(_column_bytes(group, text_column, column) for group in metadata) // max(1, sum(group.num_rows for group in metadata))
        rows = max(1, min(2048, ARROW_BYTES // max(size, 1)))
        try:
            for batch in source.iter_batches(rows, row_groups=groups, columns=[text_column], use_threads=False):
                yield from _column_values(batch.column(0))
                row += batch.num_rows
            batch = None
            pa.default_memory_pool().release_unused()
        except (pa.ArrowException, OSError) as error:
            where = f"row groups {unit.start} to {unit.stop - 1}, after row {row}"
            raise InputError(f"{file.path}: {where}: cannot be read ({_first_line(error)}); restore it") from None


def _column_bytes(group: Any, name: str, guess: int) -> int:
    """Uncompressed bytes of a column in a row group; nested columns before it may have moved its number."""
    numbers = [guess, *range(group.num_columns)]
    number = next((number for number in numbers if number < group.num_columns and group.column(number).path_in_schema == name), None)
    return group.total_byte_size if number is None else group.column(number).total_uncompressed_size


def _arrow_rows(file: InputFile, unit: Unit, text_column: str) -> Iterator[Any]:
    import pyarrow as pa

    reader, random_access = _arrow_reader(file)
    row = 0
    try:
        batches = (reader.get_batch(number) for number in range(unit.start, unit.stop)) if random_access else iter(reader)
        for batch in batches:
            column = batch.column(text_column)
            step = max(1, min(2048, ARROW_BYTES * batch.num_rows // max(column.nbytes, 1)))
            for start in range(0, batch.num_rows, step):
                yield from _column_values(column.slice(start, step))
            row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file.path}: after row {row}: cannot be read ({_first_line(error)}); restore it, or pass --skip-bad-shards"
        ) from None


def _jsonl_rows(file: InputFile, unit: Unit, text_column: str) -> Iterator[Any]:
    """A line belongs to the unit in which its first byte lies. Blank lines are no rows."""
    with open_file(file.path) as source:
        position = unit.start
        if unit.start > 0:
            source.seek(unit.start - 1)
            position += len(source.readline()) - 1
        number = 0
        while unit.stop == WHOLE_FILE or position < unit.stop:
            try:
                line = source.readline()
            except damage() as error:
                raise InputError(
                    f"{file.path}: after line {number} of the unit: cannot be read ({_first_line(error)}); restore it"
                ) from None
            if not line:
                return
            position += len(line)
            number += 1
            if line.strip():
                yield _field(line, text_column)


def _field(line: bytes, text_column: str) -> Any:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return Refused("invalid-utf8")
    except (ValueError, RecursionError):
        return Refused("invalid-json")
    if not isinstance(row, dict):
        return Refused("invalid-json")
    value = row.get(text_column)
    if isinstance(value, str) and b"\\ud" in line.lower():
        try:
            value.encode()
        except UnicodeEncodeError:
            return Refused("invalid-utf8")
    return value


def _text_rows(file: InputFile, split: str) -> Iterator[Any]:
    """`split`: "file" (the file is one document), "blank-lines", "lines", or a separator that ends each document."""
    try:
        if split == "file":
            yield _whole_file(file)
            return
        with open_file(file.path) as source:
            yield from _split_stream(source, split)
    except damage() as error:
        raise InputError(f"{file.path}: cannot be read ({_first_line(error)}); restore it") from None


def _whole_file(file: InputFile) -> bytes | memoryview:
    """A local file is mapped, so that one larger than memory is a document too."""
    if _is_compressed(file.path) or "://" in file.path or file.bytes == 0:
        with open_file(file.path) as source:
            return source.read()
    with open(file.path, "rb") as local:
        return memoryview(mmap.mmap(local.fileno(), 0, access=mmap.ACCESS_READ))


def _split_stream(source: IO[bytes], split: str) -> Iterator[bytes]:
    """Pieces between separators, the separators left out; runs of blank lines are one separator. Memory: one piece and one read."""
    expression = {"blank-lines": rb"\r?\n[ \t]*\r?\n\s*", "lines": rb"\r?\n"}.get(split) or re.escape(split.encode())
    pattern = re.compile(expression)
    waiting: list[bytes] = []
    rest = b""
    while chunk := source.read(READ_BYTES):
        *whole, rest = pattern.split(rest + chunk)
        if split == "blank-lines" and whole and not rest:
            rest = whole.pop() + b"\n\n"
        if whole:
            whole[0] = b"".join([*waiting, whole[0]])
            waiting = []
            yield from (piece for piece in whole if piece)
        if len(rest) > LONG_SEPARATOR:
            waiting.append(rest[:-LONG_SEPARATOR])
            rest = rest[-LONG_SEPARATOR:]
    rest = b"".join([*waiting, rest])
    if split == "blank-lines":
        rest = rest.rstrip()
    if rest:
        yield rest
