"""Writing a shard of tokens: under temporary names, durable before it has its own."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from argonne import files
from argonne.errors import InputError
from argonne.layout import index_of
from argonne.tokens.shards import HEADER_BYTES, LARGEST_SHARD, header


class ShardWriter:
    """Writes one shard and its document ends under temporary names; `close` makes both durable and renames them.

    vocab_size: ids are below it; None: below what the dtype holds.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: str,
        limit: int | None = LARGEST_SHARD,
        vocab_size: int | None = None,
    ) -> None:
        self.limit = limit
        self._bound = min(np.iinfo(dtype).max + 1, vocab_size or 1 << 32)
        self.path, self.dtype = folder / f"{name}.bin", dtype
        self._temporary = folder / f"{files.TEMPORARY}{name}.bin-{os.getpid()}"
        self._file = open(self._temporary, "wb")  # noqa: SIM115 closed by close or abort
        self._file.write(header(dtype, 0))
        self.tokens = self.text_bytes = self.documents = self._ended = 0
        self._ends: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Append whole documents: their tokens one after the other and the length of each."""
        self.extend(tokens)
        self.end_documents(lengths, text_bytes)

    def extend(self, tokens: np.ndarray) -> None:
        """Append tokens; `end_documents` follows. Raises InputError for an id that no reader could tell from another,
        or that is none of the vocabulary.
        """
        if len(tokens) and (int(tokens.max()) >= self._bound or int(tokens.min()) < 0):
            wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise InputError(
                f"{self.path}: id {wrong:,} is not among the {self._bound:,} that it may hold ({self.dtype}); the "
                "tokenizer is not the one that the plan is of: remove the folder and prepare again"
            )
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self.tokens += len(tokens)

    def end_documents(self, lengths: np.ndarray, text_bytes: int) -> None:
        """The tokens since the last document's end were documents of these lengths."""
        self._ends.append(self._ended + np.cumsum(lengths, dtype=np.uint64))
        self._ended = self.tokens
        self.documents += len(lengths)
        self.text_bytes += text_bytes

    def close(self) -> dict[str, Any]:
        """Finish the shard; its manifest entry."""
        if self.limit is not None and self.tokens > self.limit:
            raise InputError(
                f"{self.path}: {self.tokens:,} tokens, more than the {self.limit:,} of one shard; cut this document up"
            )
        self._file.seek(0)
        self._file.write(header(self.dtype, self.tokens))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = index_of(self.path)
        files.write_bytes(index, np.concatenate([np.zeros(0, "<u8"), *self._ends]).astype("<u8").tobytes())
        entry = {
            "file": self.path.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "bytes": HEADER_BYTES + self.tokens * np.dtype(self.dtype).itemsize,
            "sha256": files.sha256_of_file(self._temporary),
            "index_sha256": files.sha256_of_file(index),
        }
        os.replace(self._temporary, self.path)
        files.fsync_path(self.path.parent)
        return entry

    def abort(self) -> None:
        """Leave nothing behind; also on a full disk, where closing fails once more."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)
