"""The final model of a fine-tuning run in the hands of TRL and transformers, and their losses beside ours.

All three mean the same by a step's loss: the negative log-likelihood of the trained tokens, summed over all
micro-batches of the step, over their number in all of them (`num_items_in_batch`). What is trained: TRL's
`assistant_only_loss` is `loss_on = "assistant"`; with `completion_only_loss` beside it, of rows whose completion is the
last answer, it is `loss_on = "last"` (a completion alone also holds the newline behind the turn end). The ids are the
same where nobody types a control token, which transformers parses.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.config import BatchSection, DpoSection, Recipe, SourceSection
from argonne.data.chat_data import open_conversations
from argonne.data.loader import Loader
from argonne.data.pair_data import PairData
from argonne.layout import FINAL_MODEL
from argonne.model.load import load_model
from argonne.recipe import load_recipe
from argonne.stages.pretrain import run
from argonne.stages.sft import SFT
from argonne.tokens.tokenizer import load_tokenizer
from argonne.train.preference import pair_scores, preference
from tests.data.test_rendered import row, write
from tests.stages.gradients import in_micro_batches, opened
from tests.stages.other_trainers import MICRO_BATCHES, MICRO_ROWS
from tests.tokensets import words
from tests.train.helpers import stored
from tests.tuning import pairs

pytestmark = pytest.mark.campaign
Nano = Callable[..., Recipe]
STEP = MICRO_ROWS * MICRO_BATCHES


def said(count: int, seed: int) -> str:
    return words(count + 1, seed).replace("<|im_end|>", "end")


ROWS = [row(said(n % 7, n), said(n % 9, n + 1), "And?", said(n % 5, n + 2)) for n in range(3 * STEP)]


@pytest.fixture(scope="module")
def final(nano: Nano, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `argonne sft` leaves of a small pretrained model."""
    folder = tmp_path_factory.mktemp("chat")
    plain = {"schedule.warmup": "0", "checkpoint.sample_prompt": "", "eval.windows": "0", "train.steps": "2"}
    sizes = {"model.max_position_embeddings": "256", "model.sliding_window": "16"}
    run(nano(**plain, **sizes, **{"schedule.decay": "0", "schedule.min_ratio": "none"}), folder / "base")
    source = write(folder / "rows.jsonl", ROWS)
    how = {
        "model.init_from": json.dumps(str(folder / "base")),
        "data.sources": f"[{{ path = {json.dumps(str(source))}, max_epochs = 9 }}]",
        "data.sequence_length": "256",
        "batch.tokens_per_step": "512",
        "train.epochs": "none",
        "train.threads": "1",
        "log.tensorboard": "false",
    }
    run(load_recipe("nano-3.0-sft", {**plain, **how}), folder / "run", stage=SFT)
    return folder / "run" / FINAL_MODEL


@pytest.fixture(scope="module")
def theirs(final: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process that cannot import argonne found; see other_trainers.py."""
    folder = tmp_path_factory.mktemp("theirs")
    source = write(folder / "rows.jsonl", ROWS)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
    }
    base = final.parents[1] / "base" / FINAL_MODEL
    two = [str(base), str(write_pairs(folder))]
    script = str(Path(__file__).with_name("other_trainers.py"))
    command = [sys.executable, script, str(final), str(source), str(folder), *two]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    answers = [line.removeprefix("@@") for line in done.stdout.splitlines() if line.startswith("@@")]
    assert answers, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(answers[0])
    return found


def write_pairs(folder: Path) -> Path:
    return write(folder / "pairs.jsonl", pairs(8))


@pytest.mark.parametrize(
    ("name", "loss_on"),
    [("trl, assistant", "assistant"), ("trl, assistant in the completion", "last"), ("transformers", "assistant")],
)
def test_the_loss_of_a_step_is_that_of_packed_rows(
    name: str, loss_on: str, final: Path, theirs: dict[str, Any], tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl", ROWS[:STEP])
    data = opened(source, load_tokenizer(final), loss_on=loss_on)
    assert data.rows(0) < STEP
    model = load_model(final).model.train()
    with Loader(data, 0, 1, 1, prefetch=0) as loader:
        batch = loader.batch(0)
    ours, _ = in_micro_batches(model, batch.micro_batches, batch.count)
    assert batch.count == theirs[name]["tokens"]
    assert theirs[name]["loss"] == pytest.approx(ours, rel=1e-6)


def test_the_loss_of_pairs_is_that_of_packed_ones(final: Path, theirs: dict[str, Any], tmp_path: Path) -> None:
    data = open_conversations(
        [SourceSection(path=str(write_pairs(tmp_path)), max_epochs=1)],
        PairData,
        tokenizer=load_tokenizer(final),
        sequence_length=256,
        cache=tmp_path / "cache",
        batch=BatchSection(tokens_per_step=256 * 3),
        seed=0,
    )
    rows = data.rows(0)
    micro = {name: torch.from_numpy(array.values) for name, array in data.read(0, 0, rows, rows).items()}
    assert int(micro["pairs"].sum()) == theirs["trl, pairs"]["pairs"]
    losses = {}

    def forward(model: Any, objective: Any) -> None:
        with torch.no_grad():
            given = {name: micro[name] for name in ("input_ids", "position_ids")}
            model(**given, use_cache=False, objective=objective)

    def reference(head: Any, hidden: torch.Tensor) -> torch.Tensor:
        micro["reference"] = pair_scores(head, hidden, micro)[0]
        return hidden.sum()

    def policy(head: Any, hidden: torch.Tensor) -> torch.Tensor:
        losses["pairs"] = preference(DpoSection(beta=0.1))(head, hidden, micro).total
        return hidden.sum()

    forward(load_model(final.parents[1] / "base").model, reference)
    forward(load_model(final).model, policy)
    ours = float(losses["pairs"]) / int(micro["pairs"].sum())
    assert abs(ours - math.log(2)) > 1e-3  # policy and reference differ
    assert theirs["trl, pairs"]["loss"] == pytest.approx(ours, rel=1e-5)


def test_transformers_resumes_it_from_a_checkpoint_as_if_it_had_not_stopped(theirs: dict[str, Any]) -> None:
    whole, resumed, half = (stored(Path(theirs[name])) for name in ("whole", "resumed", "half"))
    assert whole == resumed
    assert whole != half
