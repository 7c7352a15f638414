"""Token shards on disk: one header, tokens, document ends, and a manifest that names them all.

`tokens-00000.bin`: 256 int32 of header (magic, version, tokens as two uint32), then the tokens. uint32 with magic
20240801 and version 7, or uint16 with magic 20240520 and version 1: what llm.c's readers and the readers of the
family's `train.bin` accept. `tokens-00000.idx`: one uint64 a document, the shard's token count up to and including its
last token. Version 1 of this format is final.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from argonne import files
from argonne.errors import InputError
from argonne.layout import MANIFEST, TOKENIZER, index_of
from argonne.tokens.manifest import entries_of, read_manifest

HEADER_BYTES = 1024
MAGIC = {"uint32": (20240801, 7), "uint16": (20240520, 1)}
DTYPES = {magic: dtype for dtype, (magic, _) in MAGIC.items()}
LARGEST_SHARD = 2**31 - 1
OPEN_FILES = 300
MARKED = 256


def dtype_for(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def header(dtype: str, tokens: int) -> bytes:
    """The 1,024 bytes in front of the tokens."""
    magic, version = MAGIC[dtype]
    words = np.zeros(HEADER_BYTES // 4, dtype="<u4")
    words[:4] = magic, version, tokens & 0xFFFFFFFF, tokens >> 32
    return words.tobytes()


def read_header(path: Path) -> tuple[str, int]:
    """(dtype, tokens) of a token file with a header. Raises InputError naming what is wrong with it."""
    size = _size(path)
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise InputError(
            f"{path}: {size:,} bytes are less than a header of {HEADER_BYTES:,}; the file is truncated or no token file"
        )
    words = np.frombuffer(head, dtype="<u4")
    dtype = DTYPES.get(int(words[0]))
    if dtype is None:
        expected = " or ".join(str(magic) for magic in DTYPES)
        raise InputError(
            f"{path}: magic number {int(words[0])}, expected {expected}; not a token file with a header (raw tokens: "
            "raw-uint16:PATH)"
        )
    tokens = int(words[2]) | int(words[3]) << 32
    found = (size - HEADER_BYTES) // np.dtype(dtype).itemsize
    if found != tokens or (size - HEADER_BYTES) % np.dtype(dtype).itemsize:
        raise InputError(
            f"{path}: the header counts {tokens:,} tokens, the size of {size:,} bytes holds {found:,}; truncated or "
            "overwritten, write it again"
        )
    return dtype, tokens


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); restore it or prepare the tokens again") from None


class Numbers:
    """`count` numbers (None: all) of a file from byte `offset` on, read when a slice of them is asked for: where the
    file was cut since, that is an InputError, while a map of it would end the process.
    """

    def __init__(self, path: Path, dtype: str, offset: int, count: int | None) -> None:
        self.path, self.offset, self._dtype = path, offset, np.dtype(dtype).newbyteorder("<")
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with its last reader
        except OSError as error:
            raise self._unreadable(error.strerror) from None
        self._count = os.fstat(self._file.fileno()).st_size // self._dtype.itemsize if count is None else count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        width, (start, stop, _) = self._dtype.itemsize, part.indices(self._count)
        place, size, found = self.offset + start * width, max(0, stop - start) * width, b""
        while len(found) < size:
            try:
                more = os.pread(self._file.fileno(), size - len(found), place + len(found))
            except OSError as error:
                raise self._unreadable(error.strerror) from None
            if not more:
                raise self._unreadable(f"it ends at byte {place + len(found):,}, and was longer when it was opened")
            found = found + more if found else more
        return np.frombuffer(found, self._dtype)

    def _unreadable(self, reason: str | None) -> InputError:
        return InputError(f"{self.path}: cannot be read ({reason}); restore it or write it again")


@dataclass(frozen=True)
class Shard:
    """One run of tokens in a file. `offset` is the byte where they start; `index` (or `ends`) holds document ends,
    where there are any.
    """

    path: Path
    dtype: str
    tokens: int
    offset: int = HEADER_BYTES
    index: Path | None = None
    ends: np.ndarray | None = None
    sha256: str | None = None
    index_sha256: str | None = None


def _remember(files: dict[int, Any], number: int, opened: Any) -> None:
    """Only so many are open at a time."""
    files[number] = opened
    if len(files) > OPEN_FILES:
        files.pop(next(iter(files)))


class TokenStream:
    """The shards of a set as one run of tokens; position `p` is the p-th token of all."""

    def __init__(self, shards: Sequence[Shard], documents: int | None = None) -> None:
        self.shards = list(shards)
        self.starts = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)
        self.documents = documents
        self._bounds: list[int] = self.starts.tolist()
        self._open: dict[int, Numbers] = {}
        self._ends: dict[int, tuple[Numbers | np.ndarray, np.ndarray]] = {}

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return self._bounds[-1]

    def shard_tokens(self, number: int) -> Numbers:
        """The tokens of shard `number`, opened once."""
        if (opened := self._open.get(number)) is None:
            shard = self.shards[number]
            opened = Numbers(shard.path, shard.dtype, shard.offset, shard.tokens)
            _remember(self._open, number, opened)
        return opened

    def place(self, position: int) -> tuple[Path, int]:
        """The file that holds token `position`, and the token's number in it."""
        number = self.find(position)
        return self.shards[number].path, position - self._bounds[number]

    def find(self, position: int) -> int:
        """The shard that holds token `position`."""
        return bisect_right(self._bounds, position) - 1

    def copy(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (1-D, any integer dtype) with the tokens from `start`; they may lie in several shards."""
        if len(self.shards) == 1:
            out[:] = self.shard_tokens(0)[start : start + len(out)]
            return
        number, filled = self.find(start), 0
        while filled < len(out):
            inside = start + filled - int(self.starts[number])
            piece = self.shard_tokens(number)[inside : inside + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            number += 1

    def copy_shifted(self, start: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Fill `inputs` with the tokens from `start` and `targets` with those one further."""
        length = len(inputs)
        number = 0 if len(self.shards) == 1 else self.find(start)
        inside = start - self._bounds[number]
        shard = self.shard_tokens(number)
        if inside + length < len(shard):
            whole = shard[inside : inside + length + 1]
        else:
            whole = np.empty(length + 1, dtype=np.int64)
            self.copy(start, whole)
        inputs[:], targets[:] = whole[:-1], whole[1:]

    def ends_between(self, start: int, stop: int) -> np.ndarray:
        """Positions e with start < e <= stop just after a document, ascending, int64. Needs `has_documents`."""
        found = []
        for number in range(self.find(start), len(self.shards)):
            begin = int(self.starts[number])
            if begin >= stop:
                break
            ends, marks = self.shard_ends(number)
            low, high = np.searchsorted(marks, [start - begin, stop - begin], side="right").tolist()
            part = ends[max(0, low - 1) * MARKED : high * MARKED].astype(np.int64)
            found.append(part[(part > start - begin) & (part <= stop - begin)] + begin)
        return np.concatenate([np.zeros(0, np.int64), *found])

    def shard_ends(self, number: int) -> tuple[Numbers | np.ndarray, np.ndarray]:
        """The document ends of shard `number`, and every `MARKED`-th of them in memory. Raises InputError where they do
        not ascend.
        """
        if (known := self._ends.get(number)) is None:
            shard = self.shards[number]
            ends = shard.ends if shard.index is None else Numbers(shard.index, "uint64", 0, None)
            whole = np.zeros(0, np.int64) if ends is None else ends[:].astype(np.int64)
            if (np.diff(whole, prepend=0) < 0).any() or whole[-1:].max(initial=0) > shard.tokens:
                raise InputError(
                    f"{shard.index or shard.path}: its document ends do not ascend to {shard.tokens:,}, the tokens of "
                    f"{shard.path.name}; restore it or prepare the tokens again"
                )
            known = whole if ends is None else ends, whole[::MARKED].copy()
            _remember(self._ends, number, known)
        return known

    def __getstate__(self) -> dict[str, Any]:
        """Without open files: a copy in another process knows where everything lies, and opens what it reads itself."""
        return {**self.__dict__, "_open": {}, "_ends": {}}

    def reaches(self, position: int) -> bool:
        """Are there `position` tokens?"""
        return position <= self.tokens

    @contextlib.contextmanager
    def not_waiting(self) -> Iterator[None]:
        """Inside, whoever waits for tokens that are not there gets an InputError instead. In a finished set nobody
        waits.
        """
        yield

    @property
    def growing(self) -> bool:
        """Is the set still being written?"""
        return False

    @property
    def estimated_tokens(self) -> int:
        return self.tokens

    @property
    def has_documents(self) -> bool:
        return all(shard.index is not None or shard.ends is not None for shard in self.shards)

    @cached_property
    def document_ends(self) -> np.ndarray:
        """(documents,) int64 positions just after each document. Raises InputError where the format keeps none."""
        if not self.has_documents:
            raise InputError(
                f"{self.shards[0].path}: this token format does not record where documents end; prepare the text with "
                "`argonne prepare`"
            )
        each = enumerate(self._bounds[:-1])
        ends = (self.shard_ends(number)[0][:].astype(np.int64) + start for number, start in each)
        return np.concatenate([np.zeros(0, np.int64), *ends])


@dataclass(frozen=True)
class TokenSet:
    """An opened token set: training tokens, held-out tokens, and what they were made with."""

    path: Path
    format: str
    dtype: str
    fingerprint: str
    train: TokenStream
    held_out: TokenStream = field(default_factory=lambda: TokenStream([]))
    vocab_size: int | None = None
    tokenizer_folder: Path | None = None
    tokenizer_fingerprint: str | None = None
    eos_id: int | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.train.tokens

    @property
    def documents(self) -> int | None:
        return self.train.documents


def open_folder(folder: Path) -> TokenSet:
    """Open a folder written by `argonne prepare`."""
    manifest = read_manifest(folder)
    streams = []
    try:
        for name, part in (("tokens", manifest), ("held-out tokens", manifest["held_out"])):
            stream = TokenStream(
                [shard_of(folder, entry, manifest["dtype"]) for entry in part["shards"]], part["documents"]
            )
            if stream.tokens != part["tokens"]:
                raise InputError(
                    f"{folder}: the shards hold {stream.tokens:,} {name}, the manifest says {part['tokens']:,}; "
                    "prepare the tokens again"
                )
            streams.append(stream)
        tokenizer = manifest["tokenizer"]
        hashes = [[entry["sha256"], entry["index_sha256"]] for entry in entries_of(manifest)]
        return TokenSet(
            path=folder,
            format="shards",
            dtype=manifest["dtype"],
            # What the data is: dtype, tokenizer and the hashes of all shards; not where it lies nor how it was made.
            fingerprint=files.fingerprint([manifest["dtype"], tokenizer["fingerprint"], hashes]),
            train=streams[0],
            held_out=streams[1],
            vocab_size=tokenizer["vocab_size"],
            tokenizer_folder=folder / TOKENIZER,
            tokenizer_fingerprint=tokenizer["fingerprint"],
            eos_id=tokenizer["eos_id"],
            manifest=manifest,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{folder / MANIFEST}: damaged ({type(error).__name__}: {error}); restore it or prepare the tokens again"
        ) from None


def totals_of(parts: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts) for name in ("tokens", "documents", "text_bytes")}


def shard_of(folder: Path, entry: dict[str, Any], dtype: str) -> Shard:
    path = folder / Path(entry["file"]).name
    if path.name != entry["file"] or not all(type(entry[name]) is int for name in ("tokens", "documents")):
        raise ValueError(f"found {entry!r}, expected a file of this folder, and whole numbers")
    found_dtype, tokens = read_header(path)
    if (found_dtype, tokens) != (dtype, entry["tokens"]):
        raise InputError(
            f"{path}: holds {tokens:,} {found_dtype} tokens, the manifest says {entry['tokens']:,} {dtype}; restore it "
            "or prepare again"
        )
    index = index_of(path)
    if (size := _size(index)) != 8 * entry["documents"]:
        expected = f"{8 * entry['documents']:,} for {entry['documents']:,} documents"
        raise InputError(f"{index}: {size:,} bytes, expected {expected}; restore it or prepare again")
    return Shard(path, dtype, tokens, index=index, sha256=entry["sha256"], index_sha256=entry["index_sha256"])
