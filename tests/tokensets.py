"""Small token sets whose contents are known, and text that looks like language to a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from argonne.tokens import manifest as manifests
from argonne.tokens import shards as tokens
from argonne.tokens.tokenizer import load_tokenizer
from argonne.tokens.writer import ShardWriter

HELD_OUT_FROM = 3500
WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards mix 42 potions near Zürich, naïve café, 你好 世界, "
    "<|im_end|> maybe\n"
)


def words(count: int, seed: int = 0) -> str:
    """Text of `count` words that looks like language to a tokenizer."""
    generator = np.random.default_rng(seed)
    vocabulary = WORDS.split(" ")
    return " ".join(vocabulary[index] for index in generator.integers(0, len(vocabulary), count))


def write_token_set(
    folder: Path,
    tokenizer_folder: Path,
    lengths: Sequence[int],
    *,
    shards: int = 1,
    held_out: Sequence[int] = (),
    offset: int = 0,
) -> Path:
    """Write a finished token set: token p of the set has the id p, so that a window shows where it lies.

    A folder that holds one is returned as it is.
    """
    if (folder / tokens.MANIFEST).exists():
        return folder
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.save(folder / "tokenizer")
    parts = [list(part) for part in np.array_split(np.array(lengths, dtype=np.int64), shards)]
    train, position = [], offset
    for number, part in enumerate(parts):
        train.append(_shard(folder, f"tokens-{number:05d}", position, part))
        position += int(sum(part))
    held = [_shard(folder, "held_out-00000", HELD_OUT_FROM, list(held_out))] if held_out else []
    manifest: dict[str, Any] = {
        "format": manifests.FORMAT,
        "format_version": manifests.FORMAT_VERSION,
        "dtype": "uint32",
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "bos_id": None,
        },
        "rows": len(lengths) + len(held_out),
        "documents": len(lengths),
        "tokens": sum(lengths),
        "held_out": {
            "share": 0.0,
            "tokens": sum(held_out),
            "documents": len(held_out),
            "text_bytes": 0,
            "shards": held,
        },
        "shards": train,
        "sources": [],
    }
    manifests.write_manifest(folder, manifest)
    return folder


def _shard(folder: Path, name: str, start: int, lengths: list[int]) -> dict[str, Any]:
    writer = ShardWriter(folder, name, "uint32")
    writer.add(np.arange(start, start + sum(lengths)), np.array(lengths, dtype=np.int64), 0)
    return writer.close()
