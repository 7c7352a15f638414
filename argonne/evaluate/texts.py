"""What bits per byte is measured on: the held-out documents of a token set, or documents of text files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from argonne import layout
from argonne.errors import InputError
from argonne.layout import Kind
from argonne.tokens.formats import open_tokens
from argonne.tokens.shards import TokenSet
from argonne.tokens.tokenizer import TextTokenizer

TOKENS_BY_DEFAULT = 1_000_000


@dataclass(frozen=True)
class EvaluationText:
    """Documents as ids, each ending with EOS; `bytes` is the UTF-8 length of each document's text. `available` counts
    all there were.
    """

    name: str
    documents: list[np.ndarray]
    bytes: list[int]
    available: int
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.documents))


def open_texts(data: str | Path, tokenizer: TextTokenizer, limit: int | None = None) -> EvaluationText:
    """The documents behind `data`: a folder written by `argonne prepare` (its held-out part), or a glob or file of
    text.

    At most `limit` tokens are taken, in whole documents, by default a million. Raises InputError where nothing is held
    out, or the token set belongs to another tokenizer.
    """
    limit = TOKENS_BY_DEFAULT if limit is None else limit
    if limit < 1:
        raise InputError(f"limit: found {limit}, expected at least 1 token")
    # A run or a model folder holds texts too: not these.
    if Path(data).is_dir() and layout.kind_of(data) is not Kind.NOTHING:
        return _held_out(open_tokens(data), tokenizer, limit)
    return _from_files(str(data), tokenizer, limit)


def _held_out(tokens: TokenSet, tokenizer: TextTokenizer, limit: int) -> EvaluationText:
    if tokens.tokenizer_fingerprint is not None and tokens.tokenizer_fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"{tokens.path}: made with another tokenizer ({tokens.tokenizer_fingerprint[:12]}) than the model's "
            f"({tokenizer.fingerprint[:12]}); give text files instead"
        )
    if not tokens.held_out.tokens:
        raise InputError(
            f"{tokens.path}: holds no held-out documents; prepare it with --hold-out 0.02, or give text files"
        )
    documents: list[np.ndarray] = []
    ends = tokens.held_out.document_ends.tolist()
    for start, end in itertools.pairwise([0, *ends]):
        if start and end > limit:
            break
        ids = np.empty(end - start, dtype=np.int64)
        tokens.held_out.copy(start, ids)
        documents.append(ids)
    return EvaluationText(str(tokens.path), documents, [byte_count(tokenizer, ids) for ids in documents], len(ends))


def byte_count(tokenizer: TextTokenizer, ids: np.ndarray) -> int:
    """Bytes of the text that these ids stand for; EOS and other control tokens stand for none."""
    return int(tokenizer.token_bytes[ids].sum())


def _from_files(pattern: str, tokenizer: TextTokenizer, limit: int) -> EvaluationText:
    """Whole documents from the front until `limit` tokens are full; the first is always taken."""
    if tokenizer.eos_id is None:
        raise InputError(f"tokenizer {tokenizer.folder}: names no end-of-text token, and each document ends with one")
    documents: list[np.ndarray] = []
    sizes: list[int] = []
    drops: dict[str, int] = {}
    taken = available = 0
    for text in read_texts(pattern, drops):
        available += 1
        if taken >= limit:
            continue
        ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.int64)
        if documents and taken + len(ids) > limit:
            taken = limit
            continue
        documents.append(ids)
        sizes.append(len(text.encode()))
        taken += len(ids)
    if not documents:
        raise InputError(f"{pattern}: no document with text in it ({drops or 'no rows'})")
    return EvaluationText(pattern, documents, sizes, available, drops)


def read_texts(pattern: str, drops: dict[str, int]) -> Iterator[str]:
    """The documents of text files in the order that `argonne prepare` reads them; rows that are none are counted in
    `drops` by reason.
    """
    from argonne.prepare.documents import Unit, cut, find_files, read_unit, unit_bytes

    found = find_files([pattern])
    for number, file in enumerate(found):
        for start, stop in cut(file, unit_bytes(found), "text"):
            for batch in read_unit(file, Unit(0, number, start, stop), "text", "file"):
                for reason, count in batch.drops.items():
                    drops[reason] = drops.get(reason, 0) + count
                yield from (text if isinstance(text, str) else "".join(text.blocks()) for text in batch.texts)
