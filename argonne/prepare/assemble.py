"""From the shards of the units to the shards of the set, where they are not the same: duplicates out, or all in one `train.bin`.

The units' shards stay untouched in `parts/` until the manifest is written, so that an interruption here costs nothing but this step.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from argonne.layout import index_of
from argonne.tokens.shards import ShardWriter, read_header

PARTS = "parts"
# One document: 128-bit hash of its text, bytes of its text.
DOCUMENT = np.dtype([("low", "<u8"), ("high", "<u8"), ("bytes", "<i8")])
COPY_TOKENS = 1 << 22


def is_staged(recipe: dict[str, Any]) -> bool:
    """Does the set differ from the units' own shards?"""
    return bool(recipe["dedup"]) or recipe["format"] == "train.bin"


def is_whole(recipe: dict[str, Any], record: dict[str, Any], out: Path) -> bool:
    """Are the shards that a unit's record names there in full? They were when it was written; a folder may have been copied in part."""
    folder = out / PARTS if is_staged(recipe) else out
    for entry in _entries(record):
        wanted = {".bin": entry["bytes"], ".idx": 8 * entry["documents"]}
        if is_staged(recipe):
            wanted[".doc"] = DOCUMENT.itemsize * entry["documents"]
        for suffix, expected in wanted.items():
            path = (folder / entry["file"]).with_suffix(suffix)
            if not path.is_file() or path.stat().st_size != expected:
                return False
    return True


def text_hash(text: bytes | memoryview) -> tuple[int, int]:
    """(low, high) of the first 128 bits of BLAKE2b of the UTF-8 text."""
    value = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return value & (2**64 - 1), value >> 64


def assemble(recipe: dict[str, Any], records: Sequence[dict[str, Any]], out: Path, dtype: str) -> list[dict[str, Any]]:
    """Write the final shards of `out` from those of the units; the records as they are then, drops of duplicates included.

    Of equal texts the first in the order of the plan stays (within a unit: training documents before held-out ones).
    """
    keep = first_copies(out, records) if recipe["dedup"] else None
    single = recipe["format"] == "train.bin"
    outputs = {"train": _Target(out, "train", dtype), "held_out": _Target(out, "held_out", dtype)} if single else {}
    found, position = [], 0
    for record in records:
        after = {**record, "drops": dict(record["drops"])}
        for split, part in (("train", record), ("held_out", record["held_out"])):
            shards, kept = [], {"tokens": 0, "documents": 0, "text_bytes": 0}
            for entry in part["shards"]:
                mask = None if keep is None else keep[position : position + entry["documents"]]
                position += entry["documents"]
                new = outputs[split].append(entry, mask) if single else _copy(out, entry, mask, dtype)
                shards.append(new)
                for name in kept:
                    kept[name] += new[name]
                if duplicates := entry["documents"] - new["documents"]:
                    after["drops"]["duplicate"] = after["drops"].get("duplicate", 0) + duplicates
            changed = {**kept, "shards": [] if single else [shard for shard in shards if shard["documents"]]}
            after = {**after, **changed} if split == "train" else {**after, "held_out": changed}
        found.append(after)
    if single and found:
        found[0] = {
            **found[0],
            "shards": outputs["train"].close(),
            "held_out": {**found[0]["held_out"], "shards": outputs["held_out"].close()},
        }
    return found


def first_copies(out: Path, records: Sequence[dict[str, Any]]) -> np.ndarray:
    """(documents,) bool over all shards in order: is this the first document with its text? 24 bytes a document, and a sort."""
    parts = [_documents(out, entry) for record in records for entry in _entries(record)]
    whole = np.concatenate(parts) if parts else np.zeros(0, DOCUMENT)
    order = np.lexsort((whole["high"], whole["low"]))
    ordered = whole[["low", "high"]][order]
    again = np.zeros(len(whole), dtype=bool)
    if len(whole):
        again[1:] = ordered[1:] == ordered[:-1]
    keep = np.ones(len(whole), dtype=bool)
    keep[order[again]] = False
    return keep


def _entries(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [*record["shards"], *record["held_out"]["shards"]]


def _documents(out: Path, entry: dict[str, Any]) -> np.ndarray:
    return np.fromfile((out / PARTS / entry["file"]).with_suffix(".doc"), dtype=DOCUMENT)


def _copy(out: Path, entry: dict[str, Any], mask: np.ndarray | None, dtype: str) -> dict[str, Any]:
    """One shard without its duplicates; linked, not copied, where there are none."""
    if mask is None or mask.all():
        for suffix in (".bin", ".idx"):
            source, target = (out / PARTS / entry["file"]).with_suffix(suffix), (out / entry["file"]).with_suffix(suffix)
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)
        return entry
    if not mask.any():
        return {**entry, "tokens": 0, "documents": 0, "text_bytes": 0}
    writer = ShardWriter(out, Path(entry["file"]).stem, dtype)
    _append(writer, out, entry, mask)
    return writer.close()


class _Target:
    """All shards of a split as one file, whatever its size: what the family's own readers take."""

    def __init__(self, out: Path, name: str, dtype: str) -> None:
        self.out, self.name, self.dtype = out, name, dtype
        self.writer: ShardWriter | None = None

    def append(self, entry: dict[str, Any], mask: np.ndarray | None) -> dict[str, Any]:
        if self.writer is None:
            self.writer = ShardWriter(self.out, self.name, self.dtype, limit=None)
        before = (self.writer.tokens, self.writer.documents, self.writer.text_bytes)
        _append(self.writer, self.out, entry, mask)
        after = (self.writer.tokens, self.writer.documents, self.writer.text_bytes)
        return dict(zip(("tokens", "documents", "text_bytes"), (new - old for new, old in zip(after, before, strict=True)), strict=True))

    def close(self) -> list[dict[str, Any]]:
        return [] if self.writer is None else [self.writer.close()]


def _append(writer: ShardWriter, out: Path, entry: dict[str, Any], mask: np.ndarray | None) -> None:
    """The kept documents of one unit's shard, in runs of at most a few megabytes."""
    path = out / PARTS / entry["file"]
    dtype, tokens = read_header(path)
    ids = np.memmap(path, dtype=dtype, mode="r", offset=1024, shape=(tokens,)) if tokens else np.zeros(0, dtype)
    ends = np.fromfile(index_of(path), dtype="<u8").astype(np.int64)
    sizes = _documents(out, entry)["bytes"]
    lengths = np.diff(ends, prepend=0)
    for first, last in _runs(np.ones(len(ends), bool) if mask is None else mask):
        begin = int(ends[first] - lengths[first])
        for start in range(begin, int(ends[last - 1]), COPY_TOKENS):
            writer.extend(ids[start : min(start + COPY_TOKENS, int(ends[last - 1]))])
        writer.end_documents(lengths[first:last], int(sizes[first:last].sum()))


def _runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def remove_parts(out: Path) -> None:
    shutil.rmtree(out / PARTS, ignore_errors=True)
