"""Data sets of one train.bin, and recipes that read them in order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from argonne.config import Recipe
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from tests.legacy.family import sources, tokens_of

Nano = Callable[..., Recipe]


@pytest.fixture(scope="session")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of one train.bin, as `argonne prepare --format train.bin` writes it."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("tokens")
    text = folder / "topics.jsonl"
    text.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)[:40]))
    options = PrepareOptions(
        input=(str(text),), out=folder / "set", train_tokenizer=512, hold_out=0.1, workers=1, format="train.bin"
    )
    return prepare(options)


@pytest.fixture(scope="session")
def short_file(one_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train.bin of 1,000 tokens written by the format's definition alone: 256 words of 32 bits, then
    uint32 tokens.
    """
    folder = tmp_path_factory.mktemp("short")
    header = np.zeros(256, dtype="<i4")
    header[[0, 2]] = 20240801, 1000
    (folder / "train.bin").write_bytes(header.tobytes() + tokens_of(one_file)[5000:6000].astype("<u4").tobytes())
    shutil.copytree(one_file / "tokenizer", folder / "tokenizer")
    return folder / "train.bin"


@pytest.fixture
def in_order(nano: Nano, one_file: Path) -> Nano:
    """Recipes on the train.bin, with nothing that takes time beside training."""

    def make(preset: str = "nano-3.0", **overrides: str) -> Recipe:
        quiet = {
            "checkpoint.sample_prompt": "",
            "checkpoint.every_steps": "0",
            "eval.windows": "0",
            "eval.every_steps": "0",
        }
        return nano(preset, **{**quiet, **sources(one_file), **overrides})

    return make
