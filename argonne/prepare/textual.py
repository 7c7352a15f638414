"""Rows of text files: the bytes of a file unpacked, the lines of jsonl, plain text whole or split."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

from argonne.errors import InputError, first_line
from argonne.prepare.texts import READ_BYTES, REMEDY, FileBytes, Refused, open_path, read_faults
from argonne.tokens.formats import PACKED

LONG_SEPARATOR = 1 << 12
PACKED_BYTES = 1 << 13
ZSTD_WINDOW = 1 << 31


def is_compressed(path: str) -> bool:
    return path.lower().endswith(PACKED)


def open_file(path: str) -> IO[bytes]:
    """The file's bytes, unpacked. Raises InputError when it cannot be opened; reading may raise `read_faults`."""
    try:
        raw = open_path(path)
    except read_faults(path) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: cannot be opened ({reason}); {REMEDY}") from None
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.lower().endswith(".bz2"):
        return io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor), READ_BYTES)
    if path.lower().endswith(".xz"):
        return io.BufferedReader(_Streams(raw, lzma.LZMADecompressor), READ_BYTES)
    if path.lower().endswith((".zst", ".zstd")):
        import zstandard

        return io.BufferedReader(
            _Streams(raw, zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj), READ_BYTES
        )
    return raw


class _Streams(io.RawIOBase):
    """Compressed streams one after the other, unpacked. A last one that is cut off is an error, and so is what begins
    none: the libraries' own readers end there in silence.

    8 KiB go in at a time and, where the library can stop, at most 1 MiB comes out.
    """

    def __init__(self, raw: IO[bytes], new: Callable[[], Any]) -> None:
        self._raw, self._new = raw, new
        self._stream: Any = None
        self._left, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            hungry = getattr(self._stream, "needs_input", True)  # zstd gives all there is
            packed = (self._left or self._raw.read(PACKED_BYTES)) if hungry else b""
            if self._stream is None:
                if not packed:
                    return 0
                self._left = packed = packed.lstrip(b"\0")  # xz pads its streams
                if not packed:
                    continue
                self._stream = self._new()
            elif hungry and not packed:
                raise EOFError("it ends in the middle of a compressed stream")
            limit = (READ_BYTES,) if hasattr(self._stream, "needs_input") else ()
            self._ready = memoryview(self._stream.decompress(packed, *limit))
            self._stream, self._left = (None, self._stream.unused_data) if self._stream.eof else (self._stream, b"")
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def jsonl_rows(path: str, start: int, stop: int | None, text_column: str) -> Iterator[Any]:
    """The values of a field. Blank lines are no rows."""
    return (_field(line, text_column) for _, line in jsonl_lines(path, start, stop))


def jsonl_objects(path: str, start: int, stop: int | None) -> Iterator[tuple[int, Any]]:
    """(number of the line from `start` on, the object it holds or why it holds none)."""
    for number, line in jsonl_lines(path, start, stop):
        row = parsed_line(line)
        yield number, row if isinstance(row, dict | Refused) else Refused("invalid-json")


def jsonl_lines(path: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered from 1. A line belongs to the unit in which its first byte lies. `stop`
    None: to the end of the file.
    """
    with open_file(path) as source:
        position, number = start, 0
        try:
            if start > 0:
                source.seek(start - 1)
                position += len(source.readline()) - 1
            while stop is None or position < stop:
                line = source.readline()
                if not line:
                    if stop is not None:
                        raise EOFError(f"it had {stop:,} bytes or more when the work was planned")
                    return
                position += len(line)
                number += 1
                if line.strip():
                    yield number, line
        except read_faults(path) as error:
            where = f"after line {number:,}" if start == 0 else f"after byte {position:,}"
            raise InputError(f"{path}: {where}: cannot be read ({first_line(error)}); {REMEDY}") from None


def lines_before(path: str, start: int) -> int:
    """Lines of a file that is not compressed before the first one that begins at byte `start` or after it."""
    if start == 0:
        return 0
    with open_file(path) as source:
        count, left = 0, start - 1
        while block := source.read(min(left, READ_BYTES)):
            count, left = count + block.count(b"\n"), left - len(block)
        return count + bool(source.readline())


def _field(line: bytes, text_column: str) -> Any:
    row = parsed_line(line)
    if not isinstance(row, dict):
        return row if isinstance(row, Refused) else Refused("invalid-json")
    value = row.get(text_column)
    if isinstance(value, str) and b"\\ud" in line.lower():
        try:
            value.encode()
        except UnicodeEncodeError:
            return Refused("invalid-utf8")
    return value


def parsed_line(line: bytes) -> Any:
    """`json.loads` of bytes would let lone surrogates pass and guess at UTF-16."""
    try:
        return json.loads(line.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError:
        return Refused("invalid-utf8")
    except (ValueError, RecursionError):
        return Refused("invalid-json")


def field_names(path: str) -> list[str]:
    """The fields of the first line that is a JSON object, for a message."""
    with open_file(path) as source:
        for _ in range(100):
            row = parsed_line(source.readline(READ_BYTES))
            if isinstance(row, dict):
                return list(row)
    return []


def text_rows(path: str, size: int, split: str) -> Iterator[Any]:
    """`split`: "file" (the file is one document), "blank-lines", "lines", or a separator that ends each document."""
    try:
        if split == "file" and size and not is_compressed(path) and "://" not in path:
            if len(whole := FileBytes(path)) < size:
                raise EOFError(f"it had {size:,} bytes when the work was planned")
            yield whole
            return
        with open_file(path) as source:
            if split == "file":
                yield source.read()
            else:
                yield from _split_stream(source, split)
    except read_faults(path) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); {REMEDY}") from None


def _split_stream(source: IO[bytes], split: str) -> Iterator[bytes]:
    """Pieces between separators, the separators left out; runs of blank lines are one separator. Memory: one piece and
    one read.
    """
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
