"""Small tokenizers and token sets for the data tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argonne.tokens import shards as tokens
from argonne.tokens.tokenizer import load_tokenizer, train_tokenizer

HELD_OUT_FROM = 3500
WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards mix 42 potions near Zürich, naïve café, 你好 世界, <|im_end|> maybe\n"
)


def words(count: int, seed: int = 0) -> str:
    """Text of `count` words that looks like language to a tokenizer."""
    generator = np.random.default_rng(seed)
    vocabulary = WORDS.split(" ")
    return " ".join(vocabulary[index] for index in generator.integers(0, len(vocabulary), count))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer((words(200, seed) for seed in range(50)), 400, tmp_path_factory.mktemp("tokenizer") / "small")


@pytest.fixture(scope="session")
def numbers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with an entry for each of the first 4,096 numbers."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("tokenizer") / "numbers"
    folder.mkdir()
    Tokenizer(models.WordLevel({str(number): number for number in range(4096)}, unk_token="0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "4095"}')
    return folder


TokenSetWriter = Callable[..., Path]


@pytest.fixture
def write_tokens(tmp_path: Path, numbers_folder: Path) -> TokenSetWriter:
    """Write a finished token set: token p of the set has the id p, so that a window shows where it lies.

    A name that is there is returned as it is.
    """

    def write(name: str, lengths: Sequence[int], *, shards: int = 1, held_out: Sequence[int] = (), offset: int = 0) -> Path:
        folder = tmp_path / name
        if (folder / tokens.MANIFEST).exists():
            return folder
        tokenizer = load_tokenizer(numbers_folder)
        tokenizer.save(folder / "tokenizer")
        parts = [list(part) for part in np.array_split(np.array(lengths, dtype=np.int64), shards)]
        train, position = [], offset
        for number, part in enumerate(parts):
            train.append(_shard(folder, f"tokens-{number:05d}", position, part))
            position += int(sum(part))
        held = [_shard(folder, "held_out-00000", HELD_OUT_FROM, list(held_out))] if held_out else []
        manifest: dict[str, Any] = {
            "format": tokens.FORMAT,
            "format_version": tokens.FORMAT_VERSION,
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
            "held_out": {"share": 0.0, "tokens": sum(held_out), "documents": len(held_out), "text_bytes": 0, "shards": held},
            "shards": train,
        }
        tokens.write_manifest(folder, manifest)
        return folder

    return write


def _shard(folder: Path, name: str, start: int, lengths: list[int]) -> dict[str, Any]:
    writer = tokens.ShardWriter(folder, name, "uint32")
    writer.add(np.arange(start, start + sum(lengths)), np.array(lengths, dtype=np.int64), 0)
    return writer.close()
