"""One unit of work: rows of text to shards of tokens, and the record that says the unit is complete."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from argonne import files
from argonne.data import documents, filters, tokens
from argonne.data.documents import InputFile, RowBatch, Unit
from argonne.data.tokenizer import TextTokenizer, load_tokenizer

RECORDS = "units"


@dataclass(frozen=True)
class Job:
    """What a worker needs to encode any unit of a plan; small, so that it travels to a process or a node."""

    out: str
    encoder: str = "auto"
    shard_tokens: int = tokens.LARGEST_SHARD

    def run(self, number: int) -> dict[str, Any]:
        """Encode unit `number` and return its record; the one that lies there if the unit is complete."""
        path = record_path(Path(self.out), number)
        if path.exists():
            record: dict[str, Any] = files.read_json(path)
            return record
        return encode_unit(self, number)


def record_path(out: Path, number: int) -> Path:
    return out / RECORDS / f"{number:05d}.json"


def finished(out: Path, units: int) -> dict[int, dict[str, Any]]:
    """The records of the finished units."""
    return {number: files.read_json(path) for number in range(units) if (path := record_path(out, number)).exists()}


def remove_records(out: Path) -> None:
    for path in (out / RECORDS).glob("*.json"):
        path.unlink(missing_ok=True)
    if (out / RECORDS).is_dir():
        (out / RECORDS).rmdir()


@dataclass(frozen=True)
class _Context:
    plan: dict[str, Any]
    tokenizer: TextTokenizer


@functools.lru_cache(maxsize=2)
def _context(out: str, encoder: str) -> _Context:
    plan = files.read_json(Path(out) / "plan.json")
    return _Context(plan, load_tokenizer(Path(out) / "tokenizer", plan["tokenizer"]["added_tokens"]))


def held_out_numbers(share: float, unit: int) -> Iterator[bool]:
    """For each document of a unit in turn: is it held out? Exactly `share` of them to within one, spread evenly, with a start that
    differs by unit."""
    exact = Fraction(str(share))
    begin = Fraction(int.from_bytes(hashlib.sha256(f"hold-out {unit}".encode()).digest()[:4], "little"), 1 << 32)
    total = begin
    while True:
        before, total = total, total + exact
        yield int(total) > int(before)


class _Output:
    """The shards of one split of a unit; a new one begins where the next document would make the last too large."""

    def __init__(self, folder: Path, name: str, dtype: str, limit: int) -> None:
        self.folder, self.name, self.dtype, self.limit = folder, name, dtype, limit
        self.writer: tokens.ShardWriter | None = None
        self.entries: list[dict[str, Any]] = []

    def add(self, ids: np.ndarray, lengths: np.ndarray, text_bytes: np.ndarray) -> None:
        edges = np.concatenate([[0], np.cumsum(lengths)])
        first = 0
        while first < len(lengths):
            if self.writer is None:
                number = len(self.entries)
                self.writer = tokens.ShardWriter(self.folder, self.name if number == 0 else f"{self.name}-{number}", self.dtype)
            room = self.limit - self.writer.tokens
            last = int(np.searchsorted(edges, edges[first] + room, side="right")) - 1
            if last == first and self.writer.tokens:
                self._close()
                continue
            last = max(last, first + 1)
            self.writer.add(ids[edges[first] : edges[last]], lengths[first:last], int(text_bytes[first:last].sum()))
            first = last

    def _close(self) -> None:
        if self.writer is not None:
            self.entries.append(self.writer.close())
            self.writer = None

    def close(self) -> dict[str, Any]:
        self._close()
        return {
            **{name: sum(entry[name] for entry in self.entries) for name in ("tokens", "documents", "text_bytes")},
            "shards": self.entries,
        }

    def abort(self) -> None:
        if self.writer is not None:
            self.writer.abort()


def encode_unit(job: Job, number: int) -> dict[str, Any]:
    """Write the shards of unit `number`, then its record. Raises InputError naming file and row where the input is damaged."""
    context = _context(job.out, job.encoder)
    plan, out = context.plan, Path(job.out)
    (out / RECORDS).mkdir(exist_ok=True)
    for leftover in out.glob(f"{files.TEMPORARY}*-{number:05d}*"):
        leftover.unlink(missing_ok=True)
    unit = Unit(**plan["units"][number])
    recipe = plan["recipe"]
    dtype = tokens.dtype_for(plan["tokenizer"]["vocab_size"])
    train = _Output(out, f"tokens-{number:05d}", dtype, job.shard_tokens)
    held = _Output(out, f"held_out-{number:05d}", dtype, job.shard_tokens)
    choose = held_out_numbers(recipe["hold_out"], number)
    rows, drops = 0, dict[str, int]()
    try:
        for batch in documents.read_unit(InputFile(**plan["files"][unit.file]), unit, recipe["text_column"], recipe["split"]):
            ids, lengths, sizes = _encode(context, batch)
            rows += len(batch.texts) + sum(batch.drops.values())
            keep = _keep(context, batch, lengths)
            chosen = np.array([next(choose) for _ in range(int(keep.sum()))], dtype=bool)
            is_held = np.zeros(len(lengths), dtype=bool)
            is_held[keep] = chosen
            _add(train, ids, lengths, sizes, keep & ~is_held)
            _add(held, ids, lengths, sizes, is_held)
            for reason, count in batch.drops.items():
                drops[reason] = drops.get(reason, 0) + count
    except BaseException:
        train.abort()
        held.abort()
        raise
    record = {"unit": number, "rows": rows, "drops": drops, **train.close(), "held_out": held.close()}
    files.write_json(record_path(out, number), record)
    return record


def _encode(context: _Context, batch: RowBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids of all documents, length of each, UTF-8 bytes of each); BOS where asked for and EOS included."""
    tokenizer = context.plan["tokenizer"]
    if "quality" in context.plan["recipe"]["filter"]:
        _drop_where(batch, [filters.is_low_quality(text) for text in batch.texts], "quality")
    before = [] if tokenizer["bos_id"] is None else [np.array([tokenizer["bos_id"]], np.uint32)]
    after = np.array([tokenizer["eos_id"]], np.uint32)
    pieces: list[np.ndarray] = []
    lengths = []
    for ids in context.tokenizer.encode_batch(batch.texts):
        pieces += [*before, ids, after]
        lengths.append(len(before) + len(ids) + 1)
    sizes = np.array([len(text.encode()) for text in batch.texts], dtype=np.int64)
    return np.concatenate(pieces) if pieces else np.zeros(0, np.uint32), np.array(lengths, dtype=np.int64), sizes


def _drop_where(batch: RowBatch, dropped: list[bool], reason: str) -> None:
    for _ in range(sum(dropped)):
        batch.drop(reason)
    kept = [index for index, drop in enumerate(dropped) if not drop]
    batch.texts = [batch.texts[index] for index in kept]
    batch.rows = [batch.rows[index] for index in kept]


def _keep(context: _Context, batch: RowBatch, lengths: np.ndarray) -> np.ndarray:
    keep = np.ones(len(lengths), dtype=bool)
    if "quality" in context.plan["recipe"]["filter"]:
        extra = 1 + (context.plan["tokenizer"]["bos_id"] is not None)
        keep = lengths - extra >= filters.FEWEST_TOKENS
        for _ in range(int((~keep).sum())):
            batch.drop("too-short")
    return keep


def _add(output: _Output, ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, chosen: np.ndarray) -> None:
    if chosen.all():
        output.add(ids, lengths, sizes)
    elif chosen.any():
        output.add(ids[np.repeat(chosen, lengths)], lengths[chosen], sizes[chosen])
