"""Models of random weights and small benchmarks in their own file formats."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.model.build import build_model, config_from_fields
from argonne.model.save import save_model_folder
from argonne.presets import preset
from argonne.tokens.tokenizer import load_tokenizer

QUESTIONS = [
    ["Which of these is the largest? ", "a cat", "a whale", "a mouse", "an ant", "B"],
    ['He said "2, 3" and left; what is next?', "4", "5", "2", "nothing", "A"],
    ["Where is 北京?", "China", "Chile", "Chad", "Cuba", "A"],
]
Make = Callable[[int], Path]


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Make:
    """A model folder of so long a context, of random weights."""

    def make(context: int) -> Path:
        folder, tokenizer = tmp_path_factory.mktemp("model"), load_tokenizer(tokenizer_folder)
        sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 32, "head_dim": 8, "intermediate_size": 64}
        own = {**preset("nano-3.0").fields, **sizes, "max_position_embeddings": context}
        model = build_model(config_from_fields(own), seed=3)
        tokenizer.save(folder)
        save_model_folder(model, folder, eos_id=tokenizer.eos_id, bos_id=None, pad_id=tokenizer.pad_id)
        return folder

    return make


@pytest.fixture(scope="module")
def folder(make_folder: Make) -> Path:
    return make_folder(1024)


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    """Two subjects in MMLU's own files."""
    for split, count in (("test", 3), ("dev", 2)):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        for subject in ("anatomy", "marketing"):
            with open(tmp_path / "mmlu" / split / f"{subject}_{split}.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(QUESTIONS[:count])
    return tmp_path / "mmlu"


@pytest.fixture
def word_problems(tmp_path: Path) -> Path:
    """Test and training file of GSM8K's form."""
    place = tmp_path / "gsm8k"
    place.mkdir()
    for split, count in (("test", 11), ("train", 6)):
        rows = [
            {"question": f"{one} and {one}?", "answer": f"{one}+{one}={2 * one}\n#### {2 * one}"}
            for one in range(count)
        ]
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place
