"""One unit of work: rows of text to shards of tokens, and the record that says the unit is complete."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from argonne import files, layout
from argonne.errors import InputError
from argonne.prepare import assemble, encoders, filters, hold_out
from argonne.prepare.documents import InputFile, Unit, read_unit
from argonne.prepare.texts import CHARACTERS_A_BATCH, REMEDY, ROWS_A_BATCH, Bytes, LongText, RowBatch, Text
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
    tokenizer.ending_as(plan["tokenizer"]["eos_id"])
    return plan, tokenizer, encoders.load(encoder, tokenizer)


class _Output:
    """The shards of one split of a unit; a new one begins where the next document would make the last too large."""

    def __init__(self, folder: Path, name: str, vocab_size: int, limit: int, keep_documents: bool) -> None:
        self.folder, self.name, self.vocab_size, self.limit = folder, name, vocab_size, limit
        self.keep_documents = keep_documents
        self._documents: list[np.ndarray] = []
        self.writer: ShardWriter | None = None
        self.entries: list[dict[str, Any]] = []

    def _open(self) -> ShardWriter:
        if self.writer is None:
            name = f"{self.name}-{len(self.entries)}" if self.entries else self.name
            dtype = tokens.dtype_for(self.vocab_size)
            self.writer = ShardWriter(self.folder, name, dtype, vocab_size=self.vocab_size)
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

    def add_long(self, ids: Iterator[np.ndarray], document: np.ndarray) -> np.ndarray:
        """Append one document whose ids come in pieces; there are at most as many as bytes, BOS and EOS apart. Returns
        (1,) how many.
        """
        text_bytes = int(document["bytes"].sum())
        if self.writer is not None and self.writer.tokens and self.writer.tokens + text_bytes + 2 > self.limit:
            self._close()
        writer = self._open()
        before = writer.tokens
        for piece in ids:
            writer.extend(piece)
        length = np.array([writer.tokens - before])
        writer.end_documents(length, text_bytes)
        self._documents.append(document)
        return length

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
    """Documents as ids: all ids in a row, ids of each document, hash (where it is asked for) and UTF-8 bytes of each
    document, and the file of the unit that each comes from.
    """

    ids: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray
    sources: np.ndarray

    def chosen(self, mask: np.ndarray) -> Encoded:
        if mask.all():
            return self
        ids = self.ids[np.repeat(mask, self.lengths)]
        return Encoded(ids, self.lengths[mask], self.documents[mask], self.sources[mask])


class _UnitWork:
    """The state of one unit while it is encoded."""

    def __init__(self, job: Job, number: int) -> None:
        state = (Path(job.out) / layout.UNITS_PLAN).stat()
        self.plan, tokenizer, self.encoder = _loaded(job.out, job.encoder, (state.st_ino, state.st_mtime_ns))
        self.recipe, self.tokenizer = self.plan["recipe"], self.plan["tokenizer"]
        self.cuttable = tokenizer.has_pre_tokens
        self.unit = Unit(**self.plan["units"][number])
        staged, size = assemble.is_staged(self.recipe), self.tokenizer["vocab_size"]
        folder = Path(job.out) / assemble.PARTS if staged else Path(job.out)
        folder.mkdir(exist_ok=True)
        self.train = _Output(folder, layout.shard_name(number), size, job.shard_tokens, staged)
        self.held = _Output(folder, layout.shard_name(number, held_out=True), size, job.shard_tokens, staged)
        self.share = self.recipe["hold_out"]
        self.rule = hold_out.rule_of(self.plan)
        self.places = hold_out.places(self.share, number)
        self.filters = filters.build(self.recipe, self.plan["evaluation_files"])
        self.counts = {name: np.zeros(self.unit.files, dtype=np.int64) for name in assemble.COUNTS}
        self.drops = [Counter[str]() for _ in range(self.unit.files)]
        self.waiting: list[tuple[int, Text]] = []
        self.characters = 0
        self.warnings, self.bad = list[str](), list[dict[str, str]]()

    def take(self, batch: RowBatch, source: int) -> None:
        """Filter one batch of rows of the unit's file `source`; encode them once enough wait."""
        self.counts["rows"][source] += len(batch.texts) + sum(batch.drops.values())
        texts = batch.texts
        for name, is_dropped in self.filters.items():
            kept = [text for text in texts if not is_dropped(text)]
            if len(kept) < len(texts):
                batch.drops[name] += len(texts) - len(kept)
            texts = kept
        self.drops[source] += batch.drops
        self.waiting += [(source, text) for text in texts]
        self.characters += batch.characters
        if len(self.waiting) >= ROWS_A_BATCH or self.characters >= CHARACTERS_A_BATCH:
            self.encode_waiting()

    def encode_waiting(self) -> None:
        """Encode what was taken, in its order; a long document by itself."""
        waiting, self.waiting, self.characters = self.waiting, [], 0
        for _, run in itertools.groupby(waiting, key=lambda taken: isinstance(taken[1], LongText)):
            taken = list(run)
            if isinstance(taken[0][1], LongText):
                for source, text in taken:
                    self._take_long(source, cast(LongText, text))
            else:
                self._take_texts([source for source, _ in taken], [cast(str, text) for _, text in taken])

    def _take_texts(self, sources: list[int], texts: list[str]) -> None:
        ends = [""] * len(texts)
        if self.rule == hold_out.BY_CUT:
            texts, ends = (list(part) for part in zip(*(hold_out.cut(text, self.share) for text in texts), strict=True))
        encoded = self._encode(sources, texts)
        if "quality" in self.recipe["filter"]:
            extra = 1 + (self.tokenizer["bos_id"] is not None)
            long_enough = encoded.lengths - extra >= filters.FEWEST_TOKENS
            for place in np.flatnonzero(~long_enough).tolist():
                self.drops[sources[place]]["too-short"] += 1
                ends[place] = ""
            encoded = encoded.chosen(long_enough)
        if self.rule == hold_out.BY_HASH:
            held = hold_out.falls_out(encoded.documents["low"], self.share)
        elif self.rule == hold_out.BY_PLACE:
            held = np.array([next(self.places) for _ in encoded.lengths], dtype=bool)
        else:
            held = np.zeros(len(encoded.lengths), dtype=bool)
        self._add(self.train, encoded.chosen(~held))
        self._add(self.held, encoded.chosen(held))
        if cut := [(source, end) for source, end in zip(sources, ends, strict=True) if end]:
            self._add(self.held, self._encode([source for source, _ in cut], [end for _, end in cut]))

    def _take_long(self, source: int, text: LongText) -> None:
        begin, end = hold_out.cut(text, self.share) if self.rule == hold_out.BY_CUT else (text, None)
        documents = self._documents([begin.data])
        held = (self.rule == hold_out.BY_HASH and bool(hold_out.falls_out(documents["low"], self.share)[0])) or (
            self.rule == hold_out.BY_PLACE and next(self.places)
        )
        output = self.held if held else self.train
        self._count(output, [source], output.add_long(self._long_ids(begin), documents), documents)
        if end:
            documents = self._documents([end.data])
            self._count(self.held, [source], self.held.add_long(self._long_ids(end), documents), documents)

    def _add(self, output: _Output, encoded: Encoded) -> None:
        output.add(encoded)
        self._count(output, encoded.sources, encoded.lengths, encoded.documents)

    def _count(
        self, output: _Output, sources: Sequence[int] | np.ndarray, lengths: np.ndarray, documents: np.ndarray
    ) -> None:
        """Add documents of the unit's files `sources` to what these count."""
        if output is self.held:
            np.add.at(self.counts["held_out_documents"], sources, 1)
            return
        for name, values in (("documents", 1), ("tokens", lengths), ("text_bytes", documents["bytes"])):
            np.add.at(self.counts[name], sources, values)

    def _encode(self, sources: list[int], texts: list[str]) -> Encoded:
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
        documents = self._documents([text.encode() for text in texts])
        return Encoded(whole, lengths + extra, documents, np.array(sources, dtype=np.int64))

    def _documents(self, texts: Sequence[bytes | Bytes]) -> np.ndarray:
        """Size of each text and, where duplicates are looked for or a hash decides, its hash."""
        found = np.zeros(len(texts), dtype=assemble.DOCUMENT)
        found["bytes"] = [len(text) for text in texts]
        if self.recipe["dedup"] or self.rule == hold_out.BY_HASH:
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
        self.encode_waiting()
        counts = {name: values.tolist() for name, values in self.counts.items()}
        sources = [
            {**{name: values[number] for name, values in counts.items()}, "drops": drops}
            for number, drops in enumerate(self.drops)
        ]
        return {
            "unit": self.unit.index,
            "rows": sum(counts["rows"]),
            "drops": sum(self.drops, Counter[str]()),
            **self.train.close(),
            "held_out": self.held.close(),
            "sources": sources,
            "warnings": self.warnings,
            "bad": self.bad,
        }

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
    try:
        for source in range(work.unit.files):
            file = InputFile(**work.plan["files"][work.unit.file + source])
            taken = True
            try:
                for batch in read_unit(file, work.unit, recipe["text_column"], recipe["split"]):
                    taken = False
                    work.take(batch, source)
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
