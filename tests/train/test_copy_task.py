"""The copy task: 32 random tokens, repeated. Labels that are shifted twice or not at all train to a low loss and cannot
do it.

The judge knows nothing of labels: it generates greedily, and computes its own cross-entropy of logits[i] against token
i + 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from argonne.config import Recipe
from argonne.data.dataset import TrainingData
from argonne.data.loader import Array
from argonne.data.windows import IGNORED
from argonne.model.load import load_model
from argonne.parallel.objective import Head, Loss, MicroBatch
from argonne.recipe import build, resolve
from argonne.report.records import read_metrics
from argonne.serve.engine import complete_ids
from argonne.serve.options import SamplingOptions
from argonne.stages import pretrain
from argonne.stages.pretrain import run
from argonne.train.objectives import next_token

HALF, VOCABULARY, STEPS, ROWS = 32, 16, 120, 32


def pairs(count: int, seed: int) -> np.ndarray:
    """(count, 64) random tokens, each row's second half its first again."""
    half = np.random.default_rng(seed).integers(0, VOCABULARY, (count, HALF))
    return np.concatenate([half, half], axis=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token file in which every window of 64 tokens is one pair."""
    folder = tmp_path_factory.mktemp("copy")
    (folder / "tokenizer").mkdir()
    model = {"type": "WordLevel", "vocab": {str(number): number for number in range(VOCABULARY)}, "unk_token": "0"}
    (folder / "tokenizer" / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    )
    tokens = pairs(STEPS * ROWS + 1, seed=1).astype("<u2")
    head = np.zeros(256, dtype="<u4")
    head[:3] = 20240520, 1, tokens.size
    path = folder / "pairs.bin"
    path.write_bytes(head.tobytes() + tokens.tobytes())
    return path


def copy_recipe(data: Path) -> Recipe:
    model = {
        "preset": "argonne-2.5",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 2 * HALF,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 128}
    tree = {
        "model": model | heads,
        "data": {"sources": [{"path": str(data)}], "sequence_length": 2 * HALF},
        "batch": {"tokens_per_step": ROWS * 2 * HALF, "micro": ROWS},
        "optim": {"lr": 3e-3, "weight_decay": 0.0},
        "schedule": {"kind": "wsd", "warmup": 10, "decay": 0.2},
        "train": {"steps": STEPS, "precision": "fp32", "device": "cpu"},
        "checkpoint": {"every_minutes": 0, "sample_prompt": ""},
        "log": {"every_steps": 10, "tensorboard": False},
    }
    return resolve(build(Recipe, tree))


@dataclass(frozen=True)
class Verdict:
    """Last training loss (a pair's first half cannot be known), and what the judge found on pairs never trained on."""

    training_loss: float
    cross_entropy: float
    copied: float


def judge(folder: Path) -> Verdict:
    model = load_model(folder).model
    unseen = pairs(16, seed=2)
    with torch.no_grad():
        log_probs = model(input_ids=torch.from_numpy(unseen)).logits.double().log_softmax(-1).numpy()
    places = np.arange(HALF - 1, 2 * HALF - 1)
    cross_entropy = -np.mean([log_probs[row, i, unseen[row, i + 1]] for row in range(len(unseen)) for i in places])
    prompts = unseen[:, :HALF].tolist()
    written = [
        done.ids for done in complete_ids(model, prompts, SamplingOptions(max_new_tokens=HALF, temperature=0.0), [])
    ]
    copied = np.mean([np.mean(np.array(row) == unseen[number, HALF:]) for number, row in enumerate(written)])
    last = read_metrics(folder).last("step")
    assert last is not None
    return Verdict(float(last["loss"]), float(cross_entropy), float(copied))


def shifted_twice(patch: pytest.MonkeyPatch) -> None:
    """The loader shifts what was shifted: position i learns token i + 2."""

    plain = TrainingData.read

    def read(self: TrainingData, *which: int) -> dict[str, Array]:
        arrays = plain(self, *which)
        labels = np.pad(arrays["shift_labels"].values[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
        return {**arrays, "shift_labels": Array(labels, IGNORED)}

    patch.setattr(TrainingData, "read", read)


def shifted_again_by_the_model(patch: pytest.MonkeyPatch) -> None:
    """The objective shifts labels that are shifted already: the fault that stalled a release for days."""

    def fault(head: Head, hidden: torch.Tensor, micro: MicroBatch) -> Loss:
        return next_token(head, hidden, {"shift_labels": pad(micro["shift_labels"][:, 1:], (0, 1), value=IGNORED)})

    patch.setattr(pretrain, "next_token", fault)


def not_shifted(patch: pytest.MonkeyPatch) -> None:
    """The labels are the inputs: position i learns token i, which it sees."""

    plain = TrainingData.read

    def read(self: TrainingData, *which: int) -> dict[str, Array]:
        arrays = plain(self, *which)
        return {**arrays, "shift_labels": Array(arrays["input_ids"].values, IGNORED)}

    patch.setattr(TrainingData, "read", read)


def test_the_copy_task_is_learned_through_the_real_loader_and_loop(data: Path, tmp_path: Path) -> None:
    run(copy_recipe(data), tmp_path / "run")
    verdict = judge(tmp_path / "run")
    assert verdict.cross_entropy < 0.2
    assert verdict.copied > 0.95


@pytest.mark.parametrize("plant", [shifted_twice, shifted_again_by_the_model, not_shifted])
def test_a_planted_label_fault_trains_to_a_low_loss_and_fails_the_copy_task(
    plant: Callable[[pytest.MonkeyPatch], None], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    run(copy_recipe(data), tmp_path / "run")
    verdict = judge(tmp_path / "run")
    assert verdict.training_loss < 1.6
    assert verdict.cross_entropy > 2.0
    assert verdict.copied < 0.2
