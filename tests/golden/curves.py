"""Golden curves: 20 fp32 steps of each generation at nano width on the CPU, through the real loader, loop and metrics.

Recorded in `tests/golden/curves.json`. A change of these numbers means that what is trained has changed. Where that is
wanted, record them again with `python -m tests.golden.curves` and say in the commit what changed them.

The data is computed here and its tokenizer is written out, so that nothing depends on a library's version but the
arithmetic itself.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from argonne.config import Recipe
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.recipe import build, resolve
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run

RECORDED = Path(__file__).with_name("curves.json")
VALUES = ("loss", "grad_norm")
VOCABULARY, LENGTH, END = 64, 32, 63
STEPS, ROWS = 20, 8
# Higher rates let the last bits of a processor grow beyond 1e-4 within 20 steps: at this one, SSE and AVX-512 differ by
# at most 1e-5.
RATE = 1e-3

# Each generation with the sizes of a toy and the proportions that make it special.
SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": LENGTH}
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")


def _sized(preset: str, *heads: int, **other: Any) -> dict[str, Any]:
    return {"preset": preset, **SIZES, **dict(zip(HEADS, heads, strict=True)), **other}


_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
GENERATIONS = {
    "1.0": _sized("argonne-1.0", 4, 4, 12, 48, **_NO_DROPOUT),
    "1.5": _sized("argonne-1.5", 4, 4, 9, 36, **_NO_DROPOUT),  # odd head size, as 81
    "2.0": _sized("argonne-2.0", 6, 2, 8, 50),  # the head size is the floor of hidden / heads, as 170
    "2.5": _sized("argonne-2.5", 4, 2, 8, 32),
    "3.0": _sized("argonne-3.0", 3, 1, 16, 48, num_hidden_layers=4, sliding_window=8),
    "4.0": _sized("argonne-4.0", 3, 1, 16, 48),
}
# Schedules and orders are dealt over the generations, so that each kind is in some curve.
ORDERS: dict[str, dict[str, Any]] = {
    "1.0": {"schedule.kind": "cosine", "schedule.decay": None},
    "1.5": {"schedule.kind": "constant", "schedule.decay": None, "data.order": "shuffled"},
    "2.0": {
        "schedule.kind": "steps",
        "schedule.decay": None,
        "schedule.steps": [{"step": 9, "lr": RATE / 2}],
        "data.document_mask": True,
    },
    "2.5": {"data.order": "shuffled", "data.documents": "within"},
    "3.0": {},
    "4.0": {
        "data.order": "shuffled",
        "data.document_mask": True,
        "batch.micro": 4,
    },  # and each step in two micro-batches
}
MIXED = "4.0"


def _documents(count: int, shift: int) -> list[str]:
    """Documents of 4 to 59 numbers, written as words: counting in steps that change with each document."""
    found = []
    for document in range(count):
        step, start, length = 1 + document * document % 7, document * 13 + shift, 4 + document * 11 % 56
        found.append(" ".join(str((start + step * place + place * place // 5) % END) for place in range(length)))
    return found


def write_data(folder: Path) -> Path:
    """Two token sets, `counting` and `other`, prepared with a tokenizer of number words that is written out here."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = {**{str(number): number for number in range(END)}, "<|endoftext|>": END}
    specification = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": END, "content": "<|endoftext|>", **flags}],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "0"},
    }
    (tokenizer / "tokenizer.json").write_text(json.dumps(specification))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    for name, count, shift in (("counting", 240, 5), ("other", 90, 31)):
        text = folder / f"{name}.jsonl"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in _documents(count, shift)))
        prepare(
            PrepareOptions(input=(str(text),), out=folder / name, tokenizer=tokenizer, workers=1, encoder="tokenizers")
        )
    return folder


def golden_recipe(generation: str, data: Path, changes: dict[str, Any] | None = None) -> Recipe:
    """The recipe of a recorded curve; `changes` are keys as `section.key` that a planted fault sets otherwise."""
    tree: dict[str, Any] = {
        "model": dict(GENERATIONS[generation]),
        "data": {"sources": [{"path": str(data / "counting"), "max_epochs": 9.0}], "sequence_length": LENGTH},
        "batch": {"tokens_per_step": ROWS * LENGTH, "micro": ROWS},
        "optim": {"lr": RATE},
        "schedule": {"kind": "wsd", "warmup": 4, "decay": 0.25},
        "train": {"steps": STEPS, "precision": "fp32", "device": "cpu", "threads": 1},
        "checkpoint": {"every_minutes": 0, "sample_prompt": ""},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    mixed = {
        "data.sources": [*tree["data"]["sources"], {"path": str(data / "other"), "weight": 0.5, "max_epochs": 9.0}]
    }
    for path, value in {**(mixed if generation == MIXED else {}), **ORDERS[generation], **(changes or {})}.items():
        *sections, name = path.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return resolve(build(Recipe, tree))


def measure(recipe: Recipe, folder: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of every step of a run in `folder`."""
    run(recipe, folder)
    steps = read_metrics(folder).of("step")
    return {name: [record[name] for record in steps] for name in VALUES}


def record() -> None:
    """Write every generation's curve."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder / "data")
        curves = {
            generation: measure(golden_recipe(generation, data), folder / generation) for generation in GENERATIONS
        }
    lines = [
        f'  "{generation}": {{\n'
        + ",\n".join(f'    "{value}": {json.dumps(curve[value])}' for value in VALUES)
        + "\n  }"
        for generation, curve in curves.items()
    ]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record()
