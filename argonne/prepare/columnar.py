"""Text columns of parquet and of Arrow IPC (file and stream): where to cut a file, and the values of a run of row
groups or record batches.

pyarrow trusts an Arrow file: an offset that a flipped bit has moved would be read as it is. So each record batch is
checked before a value is taken, and a stream without its end mark is taken for what it is, one that was cut off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from argonne.errors import InputError, first_line
from argonne.prepare.texts import LONG_CHARACTERS, READ_BYTES, REMEDY, open_path, read_faults

BATCH_ROWS = 2048
ARROW_BYTES = 8 << 20
ARROW_BATCHES = 64
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def cut_parquet(path: str, target: int, text_column: str | None) -> list[tuple[int, int]]:
    """Runs of row groups of about `target` bytes. Raises InputError when the file cannot be read or
    lacks the column.
    """
    with _parquet(path) as source:
        if text_column is not None:
            _check_column(path, source.schema_arrow, text_column)
        units, start, size = [], 0, 0
        for group in range(source.num_row_groups):
            size += source.metadata.row_group(group).total_byte_size
            if size >= target:
                units.append((start, group + 1))
                start, size = group + 1, 0
        if start < source.num_row_groups:
            units.append((start, source.num_row_groups))
        return units


def cut_arrow(path: str, text_column: str | None, whole_file: int) -> list[tuple[int, int]]:
    """Runs of record batches; a stream is one unit. Raises InputError when the file cannot be read or
    lacks the column.
    """
    with _arrow(path) as (reader, random_access, _):
        if text_column is not None:
            _check_column(path, reader.schema, text_column)
        if not random_access:
            return [(0, whole_file)]
        count = reader.num_record_batches
        return [(start, min(start + ARROW_BATCHES, count)) for start in range(0, count, ARROW_BATCHES)]


def every_row(path: str, format: str, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
    """Every row with all of its columns, of the row groups or record batches `start <= i < stop`. Raises what pyarrow
    and `read_faults` raise, also for a stream that was cut off.
    """
    if format == "parquet":
        with _opened_parquet(path) as source:
            _check_names(source.schema_arrow.names)
            groups = list(range(start, source.num_row_groups if stop is None else stop))
            for batch in source.iter_batches(BATCH_ROWS, row_groups=groups):
                yield from batch.to_pylist()
        return
    reader, random_access, source = _opened_arrow(path)
    with source:
        _check_names(reader.schema.names)
        numbers = range(start, reader.num_record_batches if stop is None else stop) if random_access else range(0)
        for batch in map(reader.get_batch, numbers) if random_access else reader:
            batch.validate(full=True)
            for first in range(0, batch.num_rows, BATCH_ROWS):
                yield from batch.slice(first, BATCH_ROWS).to_pylist()
        if not random_access:
            _check_end(source)


def _check_names(names: list[str]) -> None:
    """Of two columns of one name a row would hold the last."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} columns of the name {name!r}")


def faults_of(path: str) -> tuple[type[Exception], ...]:
    """What reading a damaged file raises, values that Python has none for (a date in the year 10,000) included."""
    import pyarrow as pa

    return (pa.ArrowException, ArithmeticError, LookupError, *read_faults(path))


def rows_before(path: str, format: str, start: int) -> int:
    """Rows of the row groups or record batches before `start`."""
    if format == "parquet":
        with _parquet(path) as source:
            return sum(source.metadata.row_group(group).num_rows for group in range(start))
    with _arrow(path) as (reader, _, _):
        return sum(reader.get_batch(number).num_rows for number in range(start))


def _opened_parquet(path: str) -> Any:
    import pyarrow.parquet as parquet

    source = open_path(path) if "://" in path else path
    return parquet.ParquetFile(source, buffer_size=READ_BYTES, page_checksum_verification=True)


def _parquet(path: str) -> Any:
    try:
        return _opened_parquet(path)
    except faults_of(path) as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)}); {REMEDY}") from None


def _check_column(path: str, schema: Any, text_column: str) -> None:
    import pyarrow as pa

    count = schema.names.count(text_column)
    if count != 1:
        problem = f"no column {text_column!r}" if not count else f"{count} columns of the name {text_column!r}"
        raise InputError(
            f"{path}: {problem}; it has {', '.join(schema.names) or 'none'}; choose one with --text-column"
        )
    kind = schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        texts = ", ".join(field.name for field in schema if "string" in str(field.type) and "<" not in str(field.type))
        others = (
            f"--text-column ({texts} would do)"
            if texts
            else "--text-column, or convert it to a string column (none of this file is one)"
        )
        raise InputError(f"{path}: column {text_column!r} holds {kind}, expected text; choose another with {others}")


def parquet_rows(path: str, start: int, stop: int, text_column: str) -> Iterator[Any]:
    """Values of the row groups `start <= i < stop`, with `stop` -1 of all from `start` on: text, None, or bytes for
    what is long or not UTF-8.
    """
    import pyarrow as pa

    row = before = 0
    with _parquet(path) as source:
        try:
            stop = source.num_row_groups if stop < 0 else stop
            groups = [source.metadata.row_group(group) for group in range(start, stop)]
            before = sum(source.metadata.row_group(group).num_rows for group in range(start))
            expected = sum(group.num_rows for group in groups)
            # Of all columns: what a damaged footer says of a single one ends the process where pyarrow reads it.
            size = sum(group.total_byte_size for group in groups) // max(1, expected)
            rows = max(1, min(BATCH_ROWS, ARROW_BYTES // max(size, 1)))
            for group in range(start, stop):  # one by one, so that a damaged one is named by its first row
                for batch in source.iter_batches(rows, row_groups=[group], columns=[text_column], use_threads=False):
                    yield from _values(batch.column(0))
                    row += batch.num_rows
            if row != expected:
                raise OSError(f"{row:,} rows, the file's footer says {expected:,}")
            batch = None
            pa.default_memory_pool().release_unused()
        except faults_of(path) as error:
            raise InputError(
                f"{path}: after row {before + row:,}: cannot be read ({first_line(error)}); {REMEDY}"
            ) from None


def _opened_arrow(path: str) -> tuple[Any, bool, Any]:
    """(reader, whether it is of the random-access file format, the opened file)."""
    import pyarrow as pa

    # Not mapped: a file that is cut while it is read would end the process.
    source = pa.PythonFile(open_path(path), mode="r") if "://" in path else pa.OSFile(path)
    magic = source.read(6)
    source.seek(0)
    random_access = magic == b"ARROW1"
    reader = (pa.ipc.open_file if random_access else pa.ipc.open_stream)(source)
    _ = reader.schema.names  # one that is not UTF-8 is found here
    return reader, random_access, source


@contextmanager
def _arrow(path: str) -> Iterator[tuple[Any, bool, Any]]:
    try:
        reader, random_access, source = _opened_arrow(path)
    except faults_of(path) as error:
        raise InputError(f"{path}: not a readable Arrow file or stream ({first_line(error)}); {REMEDY}") from None
    with source:
        yield reader, random_access, source


def arrow_rows(path: str, start: int, stop: int, text_column: str) -> Iterator[Any]:
    """Values of the record batches `start <= i < stop`, of all batches of a stream: text, None, or bytes for what is
    long or not UTF-8.
    """

    row = 0
    with _arrow(path) as (reader, random_access, source):
        try:
            numbers = range(start, reader.num_record_batches if stop < 0 else stop) if random_access else range(0)
            for batch in map(reader.get_batch, numbers) if random_access else reader:
                column = batch.column(text_column)
                _check_offsets(column)
                step = max(1, min(BATCH_ROWS, ARROW_BYTES * batch.num_rows // max(column.nbytes, 1)))
                for first in range(0, batch.num_rows, step):
                    yield from _values(column.slice(first, step))
                row += batch.num_rows
            if not random_access:
                _check_end(source)
        except faults_of(path) as error:
            where = (
                ""
                if random_access and start == 0
                else f" of the record batches from {start:,} on"
                if random_access
                else ""
            )
            raise InputError(
                f"{path}: after row {row:,}{where}: cannot be read ({first_line(error)}); {REMEDY}"
            ) from None


def _check_end(source: Any) -> None:
    """Raise OSError where the stream that was just read does not end as Arrow since 0.15 ends one; of older ones the
    end cannot be told.
    """
    end = source.tell()
    source.seek(0)
    if source.read(4) != END_OF_STREAM[:4]:
        return
    source.seek(max(0, end - len(END_OF_STREAM)))
    if source.read(len(END_OF_STREAM)) != END_OF_STREAM:
        raise OSError("the stream ends without its end mark: it was cut off, or its writer was killed")


def _check_offsets(column: Any) -> None:
    """Raise ArrowInvalid when a value would lie outside its buffer. Whether it is UTF-8 is asked
    later, value by value.
    """
    import pyarrow as pa
    import pyarrow.compute as compute

    column.validate()
    if pa.types.is_dictionary(column.type):
        column.indices.validate(full=True)
        bounds = compute.min_max(column.indices).as_py()
        if bounds["min"] is not None and not 0 <= bounds["min"] <= bounds["max"] < len(column.dictionary):
            raise pa.ArrowInvalid(f"dictionary index {bounds['max']:,} of {len(column.dictionary):,} entries")
        column = column.dictionary
    _as_bytes(column).validate(full=True)


def _as_bytes(column: Any) -> Any:
    """The same values in the same buffers, as bytes."""
    import pyarrow as pa

    kind = column.type
    binary = (
        pa.binary()
        if pa.types.is_string(kind)
        else pa.large_binary()
        if pa.types.is_large_string(kind)
        else pa.binary_view()
    )
    return pa.Array.from_buffers(binary, len(column), column.buffers(), offset=column.offset)


def _values(column: Any) -> Iterator[Any]:
    """Values of an Arrow column: text, None, or bytes for what is long or not UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        entries = _as_bytes(column.dictionary)
        for index in column.indices.to_pylist():
            buffer = None if index is None else entries[index].as_buffer()
            yield None if buffer is None else memoryview(buffer)
        return
    if column.nbytes < 4 * LONG_CHARACTERS:
        try:
            yield from column.to_pylist()
            return
        except UnicodeDecodeError:
            pass
    column = _as_bytes(column)
    if pa.types.is_binary_view(column.type):
        column = column.cast(pa.large_binary())
    # The bytes of each value, not copied: one value may be a good part of the memory there is.
    _, ends, data = column.buffers()
    width = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    edges = np.frombuffer(ends, dtype=width)[column.offset : column.offset + len(column) + 1].tolist()
    whole = memoryview(b"" if data is None else data)
    for number, valid in enumerate(column.is_valid().to_pylist()):
        yield whole[edges[number] : edges[number + 1]] if valid else None
