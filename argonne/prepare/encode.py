"""One unit of work: rows of text to shards of tokens, and the record that says the unit is complete."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np

from argonne import files, layout
from argonne.errors import InputError
from argonne.prepare import assemble, encoders, filters
from argonne.prepare.documents import InputFile, Unit, read_unit
from argonne.prepare.texts import REMEDY, Bytes, LongText, RowBatch
from argonne.tokens import shards as tokens
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer
from argonne.tokens.writer import ShardWriter


@dataclass(frozen=True)
class Job:
    """What a worker needs to encode any unit of a plan; small, so that it travels to a process or a node."""

    out: str
    encoder: str = "tokenizers"
    shard_tokens: int = tokens.LARGEST_SHARD

    def run(self, number: int) -> dict[str, Any]:
        """Encode unit `number` and return its record; the one that lies there if the unit is complete."""
        path = record_path(Path(self.out), number)
        return files.read_json(path) if path.exists() else encode_unit(self, number)


def record_path(out: Path, number: int) -> Path:
    return out / layout.UNITS / f"{number:05d}.json"


def finished(out: Path, units: int) -> dict[int, dict[str, Any]]:
    """The records of the finished units."""
    return {number: files.read_json(path) for number in range(units) if (path := record_path(out, number)).exists()}


@functools.lru_cache(maxsize=2)
def _loaded(
    out: str, encoder: str, _plan: tuple[int, int]
) -> tuple[dict[str, Any], TextTokenizer, encoders.ReferenceEncoder]:
    """(plan, tokenizer, encoder). `_plan`: which plan lies there now; a Ray worker outlives a folder that is removed
    and written again.
    """
    plan = files.read_json(Path(out) / layout.UNITS_PLAN)
    tokenizer = load_tokenizer(Path(out) / layout.TOKENIZER, plan["tokenizer"]["added_tokens"])
    return plan, tokenizer, encoders.load(encoder, tokenizer)


def held_out_numbers(share: float, unit: int) -> Iterator[bool]:
    """For each document of a unit in turn: is it held out? Exactly `share` of them to within one, spread evenly, with a
    start that differs by unit."""
    exact = Fraction(str(share))
    begin = Fraction(int.from_bytes(hashlib.sha256(f"hold-out {unit}".encode()).digest()[:4], "little"), 1 << 32)
    total = begin
    while True:
        before, total = total, total + exact
        yield int(total) > int(before)


class _Output:
    """The shards of one split of a unit; a new one begins where the next document would make the last too large."""

    def __init__(self, folder: Path, name: str, dtype: str, limit: int, keep_documents: bool) -> None:
        self.folder, self.name, self.dtype, self.limit = folder, name, dtype, limit
        self.keep_documents = keep_documents
        self._documents: list[np.ndarray] = []
        self.writer: ShardWriter | None = None
        self.entries: list[dict[str, Any]] = []

    def _open(self) -> ShardWriter:
        if self.writer is None:
            number = len(self.entries)
            self.writer = ShardWriter(self.folder, self.name if number == 0 else f"{self.name}-{number}", self.dtype)
        return self.writer

    def add(self, documents: Encoded) -> None:
        """Append whole documents."""
        edges = np.concatenate([[0], np.cumsum(documents.lengths)])
        first = 0
        while first < len(documents.lengths):
            writer = self._open()
            last = int(np.searchsorted(edges, edges[first] + self.limit - writer.tokens, side="right")) - 1
            if last == first and writer.tokens:
                self._close()
                continue
            last = max(last, first + 1)
            part = documents.documents[first:last]
            writer.add(
                documents.ids[edges[first] : edges[last]], documents.lengths[first:last], int(part["bytes"].sum())
            )
            self._documents.append(part)
            first = last

    def add_long(self, ids: Iterator[np.ndarray], document: np.ndarray) -> None:
        """Append one document whose ids come in pieces; there are at most as many as bytes, BOS and EOS apart."""
        text_bytes = int(document["bytes"].sum())
        if self.writer is not None and self.writer.tokens and self.writer.tokens + text_bytes + 2 > self.limit:
            self._close()
        writer = self._open()
        before = writer.tokens
        for piece in ids:
            writer.extend(piece)
        writer.end_documents(np.array([writer.tokens - before]), text_bytes)
        self._documents.append(document)

    def _close(self) -> None:
        if self.writer is not None:
            if self.keep_documents:
                files.write_bytes(self.writer.path.with_suffix(".doc"), np.concatenate(self._documents).tobytes())
            self._documents = []
            self.entries.append(self.writer.close())
            self.writer = None

    def close(self) -> dict[str, Any]:
        self._close()
        return {**tokens.totals_of(self.entries), "shards": self.entries}

    def abort(self) -> None:
        if self.writer is not None:
            self.writer.abort()


@dataclass(frozen=True)
class Encoded:
    """Documents as ids: all ids in a row, ids of each document, hash (where duplicates are looked for) and UTF-8 bytes
    of each document.
    """

    ids: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray

    def chosen(self, mask: np.ndarray) -> Encoded:
        if mask.all():
            return self
        return Encoded(self.ids[np.repeat(mask, self.lengths)], self.lengths[mask], self.documents[mask])


class _UnitWork:
    """The state of one unit while it is encoded."""

    def __init__(self, job: Job, number: int) -> None:
        state = (Path(job.out) / layout.UNITS_PLAN).stat()
        self.plan, tokenizer, self.encoder = _loaded(job.out, job.encoder, (state.st_ino, state.st_mtime_ns))
        self.recipe, self.tokenizer = self.plan["recipe"], self.plan["tokenizer"]
        self.cuttable = tokenizer.has_pre_tokens
        self.unit = Unit(**self.plan["units"][number])
        staged, dtype = assemble.is_staged(self.recipe), tokens.dtype_for(self.tokenizer["vocab_size"])
        folder = Path(job.out) / assemble.PARTS if staged else Path(job.out)
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(f"{files.TEMPORARY}*-{number:05d}*"):
            leftover.unlink(missing_ok=True)
        self.train = _Output(folder, layout.shard_name(number), dtype, job.shard_tokens, staged)
        self.held = _Output(folder, layout.shard_name(number, held_out=True), dtype, job.shard_tokens, staged)
        self.choose = held_out_numbers(self.recipe["hold_out"], number)
        self.filters = filters.build(self.recipe, self.plan["evaluation_files"])
        self.rows, self.drops, self.warnings = 0, Counter[str](), list[str]()
        self.bad: list[dict[str, str]] = []

    def take(self, batch: RowBatch) -> None:
        """Filter and encode one batch of rows."""
        self.rows += len(batch.texts) + sum(batch.drops.values())
        texts = batch.texts
        for name, is_dropped in self.filters.items():
            kept = [text for text in texts if not is_dropped(text)]
            if len(kept) < len(texts):
                batch.drops[name] += len(texts) - len(kept)
            texts = kept
        if texts and isinstance(texts[0], LongText):  # a batch of its own
            output = self.held if self.recipe["hold_out"] and next(self.choose) else self.train
            output.add_long(self._long_ids(texts[0]), self._documents([texts[0].data]))
        elif texts:
            self._take_texts(cast(list[str], texts), batch)
        self.drops.update(batch.drops)

    def _take_texts(self, texts: list[str], batch: RowBatch) -> None:
        encoded = self._encode(texts)
        if "quality" in self.recipe["filter"]:
            extra = 1 + (self.tokenizer["bos_id"] is not None)
            long_enough = encoded.lengths - extra >= filters.FEWEST_TOKENS
            if not long_enough.all():
                batch.drops["too-short"] += int((~long_enough).sum())
                encoded = encoded.chosen(long_enough)
        if self.recipe["hold_out"] and len(encoded.lengths):
            held = np.array([next(self.choose) for _ in encoded.lengths], dtype=bool)
            self.held.add(encoded.chosen(held))
            encoded = encoded.chosen(~held)
        self.train.add(encoded)

    def _encode(self, texts: list[str]) -> Encoded:
        """BOS where asked for, and EOS, included."""
        ids, lengths = self.encoder.encode(texts)
        bos, count = self.tokenizer["bos_id"], len(texts)
        extra = 1 + (bos is not None)
        ends = np.cumsum(lengths + extra)
        whole = np.empty(len(ids) + extra * count, dtype=np.uint32)
        text = np.ones(len(whole), dtype=bool)
        whole[ends - 1] = self.tokenizer["eos_id"]
        text[ends - 1] = False
        if bos is not None:
            begins = ends - lengths - extra
            whole[begins] = bos
            text[begins] = False
        whole[text] = ids
        return Encoded(whole, lengths + extra, self._documents([text.encode() for text in texts]))

    def _documents(self, texts: Sequence[bytes | Bytes]) -> np.ndarray:
        """Size of each text and, where duplicates are looked for, its hash."""
        found = np.zeros(len(texts), dtype=assemble.DOCUMENT)
        found["bytes"] = [len(text) for text in texts]
        if self.recipe["dedup"]:
            hashes = [assemble.text_hash(text) for text in texts]
            found["low"], found["high"] = [low for low, _ in hashes], [high for _, high in hashes]
        return found

    def _long_ids(self, text: LongText) -> Iterator[np.ndarray]:
        if self.tokenizer["bos_id"] is not None:
            yield np.array([self.tokenizer["bos_id"]], np.uint32)
        for piece in encoders.pieces_of(text.data, self.encoder) if self.cuttable else [bytes(text.data[:]).decode()]:
            if len(piece) > encoders.WHOLE_WITHIN_BYTES // 4:
                self.warnings.append(
                    f"a document has no safe cut in {len(piece):,} characters, which were encoded at once and took "
                    "memory for it"
                )
            yield self.encoder.encode([piece])[0]
        yield np.array([self.tokenizer["eos_id"]], np.uint32)

    def record(self) -> dict[str, Any]:
        found = {
            "unit": self.unit.index,
            "rows": self.rows,
            "drops": self.drops,
            **self.train.close(),
            "held_out": self.held.close(),
        }
        return {**found, "warnings": self.warnings, "bad": self.bad}

    def abort(self) -> None:
        self.train.abort()
        self.held.abort()


def encode_unit(job: Job, number: int) -> dict[str, Any]:
    """Write the shards of unit `number`, then its record. Raises InputError naming file and row where the input is
    damaged.
    """
    out = Path(job.out)
    (out / layout.UNITS).mkdir(exist_ok=True)
    work = _UnitWork(job, number)
    recipe = work.recipe
    file = InputFile(**work.plan["files"][work.unit.file])
    taken = True
    try:
        try:
            for batch in read_unit(file, work.unit, recipe["text_column"], recipe["split"]):
                taken = False
                work.take(batch)
                taken = True
        except UnicodeDecodeError:  # of a long text, which was checked
            raise InputError(f"{file.path}: was changed while it was read; {REMEDY}") from None
        except InputError as error:
            if not recipe["skip_bad_shards"] or not taken:  # of a document that ends in the middle no part may stay
                raise
            work.bad.append({"path": file.path, "error": str(error)})
        record = work.record()
    except BaseException:
        work.abort()
        raise
    files.write_json(record_path(out, number), record)
    return record
