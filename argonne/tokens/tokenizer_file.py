"""A tokenizer.json in memory: read once a process, kept without its Python objects, and how a batch of texts goes through it."""

from __future__ import annotations

import ctypes
import functools
import json
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from argonne import files
from argonne.errors import InputError
from argonne.layout import TOKENIZER_FILE

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class ParsedTokenizer:
    """What a tokenizer.json says, without truncation and padding; control tokens inside a text are plain text to it.

    `head`: all of it but the vocabulary and the merges, which as Python objects take more memory than the tokenizer itself.
    """

    def __init__(self, text: str, head: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.text, self.head, self.tokenizer = text, head, tokenizer
        self._lock = Lock()
        contents = [token["content"] for token in head.get("added_tokens", [])]
        self._only_nfc = head.get("normalizer") == {"type": "NFC"} and all(map(is_nfc, contents))

    def __reduce__(self) -> tuple[Any, ...]:
        return _parse, (self.text,)

    def specification(self) -> dict[str, Any]:
        """All of tokenizer.json, without truncation and padding; read anew at each call."""
        return {**json.loads(self.text), "truncation": None, "padding": None}

    @cached_property
    def fingerprint(self) -> str:
        return files.fingerprint(self.specification())

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as uint32, on the threads `tokenizers` is allowed.

        Texts that are in the normal form already, which Python tells at gigabytes a second, go past a normalizer that does nothing else: it
        takes a seventh of the work. A character that only one of the two knows is left as it is by both.
        """
        if not self._only_nfc:
            return self._encode(texts)
        normal = [is_nfc(text) for text in texts]
        passed = self._encode_normal([text for text, done in zip(texts, normal, strict=True) if done])
        if all(normal):
            return passed
        others = iter(self._encode([text for text, done in zip(texts, normal, strict=True) if not done]))
        ready = iter(passed)
        return [next(ready) if done else next(others) for done in normal]

    def _encode_normal(self, texts: Sequence[str]) -> list[np.ndarray]:
        with self._lock:
            normalizer = self.tokenizer.normalizer
            self.tokenizer.normalizer = None
            try:
                return _ids(self.tokenizer, texts)
            finally:
                self.tokenizer.normalizer = normalizer

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        with self._lock:
            return _ids(self.tokenizer, texts)


def is_nfc(text: str) -> bool:
    return unicodedata.is_normalized("NFC", text)


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


def parse_tokenizer(text: str, folder: Path) -> ParsedTokenizer:
    """What the tokenizer.json of `folder` says. Raises InputError when the library cannot read it."""
    try:
        return _parse(text)
    except Exception as error:  # the library raises a plain Exception for any fault in the file
        raise InputError(
            f"{folder / TOKENIZER_FILE}: not a tokenizer the tokenizers library can read ({error}); restore the file, or name another folder"
        ) from None


@functools.lru_cache(maxsize=2)
def _parse(text: str) -> ParsedTokenizer:
    """150,000 entries take half a second, and several parts of one command ask for the same."""
    from tokenizers import Tokenizer

    head = {name: value for name, value in json.loads(text).items() if name != "model"}
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    give_memory_back()  # reading takes twice what stays
    return ParsedTokenizer(text, head, tokenizer)


def forget_parsed() -> None:
    """Free every tokenizer.json that was read: from here on other processes work."""
    _parse.cache_clear()
    give_memory_back()


def give_memory_back() -> None:
    """Return freed memory to the system where the C library can (glibc); elsewhere the process keeps it for itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
