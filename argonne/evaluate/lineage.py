"""What a model was trained on, back through every run that it goes back to, as far as it lies on this disk.

The folders tell by `argonne.data.origin`. Whatever is missing, or is not any more what was trained on, is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from argonne import layout
from argonne.config import CHAT_STAGES
from argonne.data.chat_data import IDS
from argonne.data.origin import Origin, Parent, holds, origin_of, path_of_source, rendered_folder
from argonne.data.phases import end_of
from argonne.data.rendered import RENDERED, open_rendered
from argonne.errors import InputError
from argonne.prepare import documents
from argonne.prepare.filters import strings_in
from argonne.tokens.formats import open_tokens
from argonne.tokens.shards import TokenStream
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer

TOKENS_AT_ONCE, OVERLAP = 1 << 20, 1024  # of a longer document: its pieces share tokens, so that no words are lost
MOVED = "was read before data.sources were changed; where it lies is not recorded"

# The texts of a document, each by itself, and its bytes on the disk.
Document = tuple[Iterable[str], int]


@dataclass(frozen=True)
class Source:
    """Something that weights were trained on. size: bytes of it. why: what keeps it from being read, where it is."""

    name: str
    documents: Callable[[], Iterator[Document]] = lambda: iter(())
    size: int = 0
    why: str = ""


def sources_of(model: str | Path) -> list[Source]:
    """The sources of a run, a checkpoint, a final model or a merge of such, and of all their ancestors; an ancestor
    whose sources nothing tells stands for them.
    """
    found: dict[str, Source] = {}
    waiting = [Parent(model)]
    seen = set()
    while waiting:
        ancestor = waiting.pop()
        if ancestor in seen:
            continue
        seen.add(ancestor)
        try:
            origin = origin_of(ancestor.model, ancestor.run_id, ancestor.step)
            listed, parents = _listed(origin), origin.parents
        except InputError as error:
            listed, parents = {str(ancestor.model): Source(str(ancestor.model), why=str(error))}, []
        for key, source in listed.items():
            # What one run cannot find any more, another may name where it lies.
            if key not in found or found[key].why:
                found[key] = source
        waiting += parents
    return list(found.values())


def _listed(origin: Origin) -> dict[str, Source]:
    """The sources of one run, by fingerprint."""
    run = origin.run
    tokenizer = run and layout.tokenizer_of(origin.checkpoint or run / layout.FINAL_MODEL)
    return {
        fingerprint or f"{run}: {name}": _opened(origin, tokenizer, name, fingerprint)
        for name, fingerprint in origin.sources
    }


def _opened(origin: Origin, tokenizer: Path | None, name: str, fingerprint: str | None) -> Source:
    """A source of a run, opened; or why it cannot be."""
    path, recipe = path_of_source(origin, name), origin.state["recipe"]
    where = tokenizer or origin.run or Path()
    try:
        if recipe.get("stage") in CHAT_STAGES:
            return _conversations(origin, where, path, fingerprint)
        if path is None:
            raise InputError(MOVED)
        tokens = open_tokens(path)
        if not holds(tokens, fingerprint):
            raise InputError("holds other tokens than the run was trained on")
        reader = load_tokenizer(tokens.tokenizer_folder or recipe.get("data", {}).get("tokenizer") or where)
        ends = None if tokens.train.has_documents else reader.ending_as(end_of(tokens, reader)).eos_id
        if ends is None and not tokens.train.has_documents:
            raise InputError("nothing tells where its documents end")
        size = np.dtype(tokens.dtype).itemsize * tokens.tokens
        return Source(str(tokens.path), partial(_of_stream, tokens.train, reader, ends), size)
    except InputError as error:
        return Source(path or name, why=str(error))


def _conversations(origin: Origin, tokenizer: Path, path: str | None, fingerprint: str | None) -> Source:
    """As they were rendered for the training, else as their files are now."""
    if fingerprint is not None and ((folder := rendered_folder(origin, fingerprint)) / RENDERED).is_file():
        one = open_rendered(folder, fingerprint)
        texts = partial(_of_stream, one.train, load_tokenizer(tokenizer), one.ends["train"])
        return Source(path or str(one.folder), texts, 4 * one.train.tokens)
    if path is None:
        raise InputError(MOVED)
    files = documents.find_files([path])
    return Source(path, partial(_of_files, files), sum(file.bytes for file in files))


def _of_stream(stream: TokenStream, tokenizer: TextTokenizer, ends: np.ndarray | int | None) -> Iterator[Document]:
    """The documents of tokens. ends: of each document; or the id that ends one; None: as the stream says."""
    width, start = np.dtype(stream.shards[0].dtype).itemsize if stream.shards else 1, 0
    for block in range(0, stream.tokens, TOKENS_AT_ONCE):
        stop = min(block + TOKENS_AT_ONCE, stream.tokens)
        if isinstance(ends, int):
            ids = np.empty(stop - block, np.uint32)
            stream.copy(block, ids)
            found = np.flatnonzero(ids == ends) + block + 1
        elif ends is None:
            found = stream.ends_between(block, stop)
        else:
            found = ends[np.searchsorted(ends, block, "right") : np.searchsorted(ends, stop, "right")]
        last = [stream.tokens] if stop == stream.tokens else []
        for end in dict.fromkeys([*found.tolist(), *last]):
            yield _pieces(stream, tokenizer, start, end), (end - start) * width
            start = end


def _pieces(stream: TokenStream, tokenizer: TextTokenizer, start: int, end: int) -> Iterator[str]:
    for begin in range(start, max(start + 1, end - OVERLAP), TOKENS_AT_ONCE - OVERLAP):
        ids = np.empty(min(end, begin + TOKENS_AT_ONCE) - begin, np.uint32)
        stream.copy(begin, ids)
        yield tokenizer.decode(ids & IDS, skip_special_tokens=True)


def _of_files(files: list[documents.InputFile]) -> Iterator[Document]:
    """The rows of files of conversations or pairs, each text in them by itself."""
    for number, file in enumerate(files):
        for start, stop in documents.cut(file, documents.unit_bytes(files), None):
            for _, row in documents.read_rows(file, documents.Unit(0, number, start, stop)):
                texts = list(strings_in(row))
                yield texts, sum(map(len, texts))
