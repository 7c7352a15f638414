"""One document of text, long or short, and batches of them; what is no document carries its reason."""

from __future__ import annotations

import codecs
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from argonne.tokens.shards import Numbers

ROWS_A_BATCH = 512
CHARACTERS_A_BATCH = 1 << 20
LONG_CHARACTERS = 1 << 20
READ_BYTES = 1 << 20
REMEDY = "restore it, or pass --skip-bad-shards"


def read_faults(path: str) -> tuple[type[Exception], ...]:
    """What the readers raise for a truncated or damaged file; behind a URL any error, for each kind of system has its
    own.
    """
    import zstandard

    kinds = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
    return (Exception,) if "://" in path else kinds


def open_path(path: str) -> IO[bytes]:
    """A file of this machine, whatever its name, or what a URL leads to. Raises what `read_faults` names."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    opened: IO[bytes] = fsspec.open(path, "rb").open()
    return opened


class FileBytes:
    """A local file as bytes of which slices are read: it may be larger than memory, and be cut meanwhile."""

    def __init__(self, path: str, start: int = 0, size: int | None = None) -> None:
        self.path, self.start = path, start
        self._bytes = Numbers(Path(path), "uint8", start, size)

    def __len__(self) -> int:
        return len(self._bytes)

    def __getitem__(self, part: slice) -> memoryview:
        return self._bytes[part].data

    def part(self, start: int, stop: int) -> FileBytes:
        """Those bytes, not read either."""
        return FileBytes(self.path, self.start + start, stop - start)


Bytes = memoryview | FileBytes


class LongText:
    """A document over a megabyte, as UTF-8 bytes that were checked but not decoded."""

    def __init__(self, data: bytes | Bytes) -> None:
        self.data: Bytes = memoryview(data) if isinstance(data, bytes) else data

    @property
    def bytes(self) -> int:
        return len(self.data)

    def blocks(self) -> Iterator[str]:
        """The text decoded block by block. Raises UnicodeDecodeError."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(self.data), READ_BYTES):
            yield decoder.decode(self.data[start : start + READ_BYTES])
        yield decoder.decode(b"", final=True)


Text = str | LongText


@dataclass(frozen=True)
class Refused:
    """Stands for a row that is no document, with the reason."""

    reason: str


@dataclass
class RowBatch:
    """Documents in file order, and how many rows were no documents, by reason. A long document is a
    batch of its own.
    """

    texts: list[Text] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    characters: int = 0

    def add(self, text: Text) -> None:
        self.texts.append(text)
        self.characters += text.bytes if isinstance(text, LongText) else len(text)

    @property
    def full(self) -> bool:
        long = bool(self.texts) and isinstance(self.texts[-1], LongText)
        return long or len(self.texts) >= ROWS_A_BATCH or self.characters >= CHARACTERS_A_BATCH


def checked(value: Any) -> Text | Refused:
    """A row's value as a document, or why it is none. Bytes stand for text that was not yet decoded."""
    if isinstance(value, str):
        if not value:
            return Refused("empty")
        if len(value) <= LONG_CHARACTERS:
            return value
        try:
            return LongText(value.encode())
        except UnicodeEncodeError:
            return Refused("invalid-utf8")
    if isinstance(value, bytes | memoryview | FileBytes):
        try:
            if len(value) <= LONG_CHARACTERS:
                return bytes(value[:]).decode() or Refused("empty")
            for _ in LongText(value).blocks():
                pass
        except UnicodeDecodeError:
            return Refused("invalid-utf8")
        return LongText(value)
    if isinstance(value, Refused):
        return value
    return Refused("missing" if value is None else "not-text")
