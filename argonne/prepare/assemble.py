"""From the shards of the units to the shards of the set, where they are not the same: duplicates out, or all in one
`train.bin`.

The units' shards stay untouched in `parts/` until the manifest is written, so that an interruption here costs nothing
but this step.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from argonne.layout import index_of
from argonne.prepare.texts import READ_BYTES, Bytes
from argonne.tokens.manifest import entries_of
from argonne.tokens.shards import read_header, totals_of
from argonne.tokens.writer import ShardWriter

PARTS = "parts"
# What is counted of each file.
COUNTS = ("rows", "documents", "tokens", "text_bytes", "held_out_documents")
# One document: 128-bit hash of its text, bytes of its text.
DOCUMENT = np.dtype([("low", "<u8"), ("high", "<u8"), ("bytes", "<i8")])
COPY_TOKENS = 1 << 22


def is_staged(recipe: dict[str, Any]) -> bool:
    """Does the set differ from the units' own shards?"""
    return bool(recipe["dedup"]) or recipe["format"] == "train.bin"


def is_whole(recipe: dict[str, Any], record: dict[str, Any], out: Path) -> bool:
    """Are the shards that a unit's record names there in full? They were when it was written; a folder may have been
    copied in part.
    """
    folder = out / PARTS if is_staged(recipe) else out
    for entry in entries_of(record):
        wanted = {".bin": entry["bytes"], ".idx": 8 * entry["documents"]}
        if is_staged(recipe):
            wanted[".doc"] = DOCUMENT.itemsize * entry["documents"]
        for suffix, expected in wanted.items():
            path = (folder / entry["file"]).with_suffix(suffix)
            if not path.is_file() or path.stat().st_size != expected:
                return False
    return True


def text_hash(text: bytes | Bytes) -> tuple[int, int]:
    """(low, high) of the first 128 bits of BLAKE2b of the UTF-8 text."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(text), READ_BYTES):
        digest.update(text[start : start + READ_BYTES])
    value = int.from_bytes(digest.digest(), "little")
    return value & (2**64 - 1), value >> 64


def assemble(
    recipe: dict[str, Any], records: Sequence[dict[str, Any]], out: Path, dtype: str, *, ends_are_held: bool
) -> list[dict[str, Any]]:
    """Write the final shards of `out` from those of the units; the records as they are then, drops of duplicates
    included. `ends_are_held`: what is held out are ends of the training documents, no rows of their own.

    Of equal texts the first in the order of the plan stays (within a unit: training documents before held-out ones).
    """
    keep = _first_copies(out, records) if recipe["dedup"] else None
    # All shards of a split as one file, whatever its size: what the family's own readers take.
    single: dict[str, ShardWriter] | None = {} if recipe["format"] == "train.bin" else None
    found, position = [], 0
    for record in records:
        after = {**record, "drops": Counter(record["drops"])}
        after["sources"] = [{**own, "drops": Counter(own["drops"])} for own in sources_of(record)]
        for split, part in (("train", record), ("held_out", record["held_out"])):
            shards, first = [], 0
            for entry in part["shards"]:
                mask = None if keep is None else keep[position : position + entry["documents"]]
                position += entry["documents"]
                if single is None:
                    shards.append(_copy(out, entry, mask, dtype))
                else:
                    writer = single.get(split) or single.setdefault(split, ShardWriter(out, split, dtype, limit=None))
                    shards.append(_append(writer, out, entry, mask))
                if mask is not None and not mask.all():
                    counted = split == "train" or not ends_are_held
                    after["drops"]["duplicate"] += int((~mask).sum()) * counted
                    _leave_out(after["sources"], sources_of(record), split, out, entry, first, mask, counted)
                first += entry["documents"]
            changed = {
                **totals_of(shards),
                "shards": [shard for shard in shards if shard["documents"] and single is None],
            }
            after |= changed if split == "train" else {"held_out": changed}
        found.append(after)
    for split, writer in (single or {}).items():
        (found[0] if split == "train" else found[0]["held_out"])["shards"] = [writer.close()]
    return found


def sources_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What a unit's record counts of each of its files; in version 1 of the plan it has one."""
    own = {**record, "held_out_documents": record["held_out"]["documents"]}
    return record.get("sources") or [{name: own[name] for name in (*COUNTS, "drops")}]


def _leave_out(
    sources: list[dict[str, Any]],
    before: list[dict[str, Any]],
    split: str,
    out: Path,
    entry: dict[str, Any],
    first: int,
    mask: np.ndarray,
    counted: bool,
) -> None:
    """Take the documents that `mask` does not keep out of what is counted of each file. A unit's documents lie in the
    order of its files; those of `entry` begin with its `first`.
    """
    documents = "documents" if split == "train" else "held_out_documents"
    owners = np.repeat(np.arange(len(before)), [own[documents] for own in before])[first : first + len(mask)]
    lengths = np.diff(np.fromfile(index_of(out / PARTS / entry["file"]), dtype="<u8").astype(np.int64), prepend=0)
    sizes = _documents(out, entry)["bytes"]
    for number in np.unique(owners[~mask]).tolist():
        gone = ~mask & (owners == number)
        sources[number][documents] -= int(gone.sum())
        if split == "train":
            sources[number]["tokens"] -= int(lengths[gone].sum())
            sources[number]["text_bytes"] -= int(sizes[gone].sum())
        sources[number]["drops"]["duplicate"] += int(gone.sum()) * counted


def _first_copies(out: Path, records: Sequence[dict[str, Any]]) -> np.ndarray:
    """(documents,) bool over all shards in order: is this the first document with its text? 24 bytes a document, and a
    sort.
    """
    whole = np.concatenate(
        [np.zeros(0, DOCUMENT), *(_documents(out, entry) for record in records for entry in entries_of(record))]
    )
    order = np.lexsort((whole["high"], whole["low"]))
    ordered = whole[["low", "high"]][order]
    keep = np.ones(len(whole), dtype=bool)
    keep[order[1:]] = ordered[1:] != ordered[:-1]
    return keep


def _documents(out: Path, entry: dict[str, Any]) -> np.ndarray:
    return np.fromfile((out / PARTS / entry["file"]).with_suffix(".doc"), dtype=DOCUMENT)


def _copy(out: Path, entry: dict[str, Any], mask: np.ndarray | None, dtype: str) -> dict[str, Any]:
    """One shard without its duplicates; linked, not copied, where there are none."""
    if mask is None or mask.all():
        for suffix in (".bin", ".idx"):
            source, target = (
                (out / PARTS / entry["file"]).with_suffix(suffix),
                (out / entry["file"]).with_suffix(suffix),
            )
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)
        return entry
    if not mask.any():
        return {**entry, **totals_of([])}
    writer = ShardWriter(out, Path(entry["file"]).stem, dtype)
    _append(writer, out, entry, mask)
    return writer.close()


def _append(writer: ShardWriter, out: Path, entry: dict[str, Any], mask: np.ndarray | None) -> dict[str, Any]:
    """Write the kept documents of one unit's shard, in pieces of at most a few megabytes; what they count."""
    path = out / PARTS / entry["file"]
    dtype, tokens = read_header(path)
    ids = np.memmap(path, dtype=dtype, mode="r", offset=1024, shape=(tokens,)) if tokens else np.zeros(0, dtype)
    ends = np.fromfile(index_of(path), dtype="<u8").astype(np.int64)
    sizes = _documents(out, entry)["bytes"]
    lengths = np.diff(ends, prepend=0)
    mask = np.ones(len(ends), bool) if mask is None else mask
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).tolist()
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        begin = int(ends[first] - lengths[first])
        for start in range(begin, int(ends[last - 1]), COPY_TOKENS):
            writer.extend(ids[start : min(start + COPY_TOKENS, int(ends[last - 1]))])
        writer.end_documents(lengths[first:last], int(sizes[first:last].sum()))
    return {"tokens": int(lengths[mask].sum()), "documents": int(mask.sum()), "text_bytes": int(sizes[mask].sum())}
