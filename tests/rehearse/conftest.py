"""A folder as a user has it before a launch: tokens, conversations, pairs, and recipes that read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rehearse.commands import Rehearsals
from tests.tuning import conversations, pairs, write

RECIPES = {
    "pre": ("nano-3.0", 'sources = [{ path = "tokens", max_epochs = 200.0 }]'),
    "mid": ("nano-3.0-midtrain", 'sources = [{ path = "tokens", max_epochs = 200.0 }]'),
    "sft": ("nano-3.0-sft", 'sources = [{ path = "chat.jsonl", max_epochs = 3.0 }]'),
    "cot": ("nano-3.0-cot-sft", 'sources = [{ path = "thoughts.jsonl", max_epochs = 3.0 }]'),
    "dpo": ("nano-3.0-dpo", 'sources = [{ path = "pairs.jsonl", max_epochs = 3.0 }]'),
}


@pytest.fixture(scope="session")
def world(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(tokens, folder / "tokens")
    (folder / "topics.jsonl").write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))
    write(folder / "chat.jsonl", conversations(60))
    write(folder / "thoughts.jsonl", conversations(60, think=True))
    write(folder / "pairs.jsonl", pairs(60))
    for name, (base, data) in RECIPES.items():
        (folder / f"{name}.toml").write_text(f'base = "{base}"\n[data]\n{data}\n')
    return folder


@pytest.fixture
def folder(world: Path, tmp_path: Path) -> Path:
    """A copy of it, for one test to spoil."""
    return Path(shutil.copytree(world, tmp_path / "world"))


@pytest.fixture(scope="session")
def rehearsals() -> Iterator[Rehearsals]:
    started = Rehearsals()
    yield started
    started.close()
