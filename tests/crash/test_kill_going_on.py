"""Runs that go on from weights, midtrain and continue, killed with `kill -9` in each phase of their life: bit for bit
the runs that were never touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.report.records import read_metrics
from argonne.train.checkpoint import LAST
from tests.crash.conftest import Mother
from tests.crash.phases import epoch_ends, kill_in_each_phase
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
Finish = Callable[..., None]
SHORT, LONG = 40, 120  # steps
STAGES = {
    "midtrain": {
        "stage": '"midtrain"',
        "model.rope_theta": "1e4",
        "data.sequence_length": "64",
        "data.documents": '"within"',
    },
    "continue": {"data.order": '"shuffled"', "optim.lr": "1e-3"},
}
SHOWN = {
    "batch.micro": "2",
    "checkpoint.every_steps": "2",
    "checkpoint.sample_tokens": "16",
    "eval.every_steps": "5",
    "eval.windows": "16",
}


@pytest.fixture(scope="module")
def small(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text in the same ids, little enough for many epochs; a quarter is held out."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("small")
    texts = [text[:600] for _, text in sorted(topics.items()) if len(text) > 600][:32]
    (folder / "small.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = PrepareOptions(
        input=(str(folder / "small.jsonl"),),
        out=folder / "set",
        tokenizer=tokens / "tokenizer",
        hold_out=0.25,
        workers=1,
    )
    return prepare(options)


def _campaign(
    mother: Mother,
    finish: Finish,
    nano: Nano,
    small: Path,
    folder: Path,
    stage: str,
    *,
    steps: int,
    each: int,
    ranks: int,
) -> None:
    finish(nano(**{"train.steps": "4"}), folder / "parent")
    given = {
        "model.init_from": json.dumps(str(folder / "parent")),
        "data.sources": f"[{{ path = {json.dumps(str(small))}, max_epochs = 200 }}]",
        "train.steps": str(steps),
    }
    recipe = nano(**given, **SHOWN, **STAGES[stage])
    whole, run = folder / "whole", folder / "killed"
    finish(recipe, whole, ranks=ranks)
    ends = epoch_ends(read_metrics(whole).of("step"))
    assert len(ends) >= steps / 40
    died = kill_in_each_phase(mother, recipe, run, each=each, ends=ends, seed=ranks, ranks=ranks)
    finish(recipe, run, ranks=ranks)
    print(f"{stage}, {ranks} ranks: {died['kills']} kills: {dict(died)}")
    assert [record["step"] for record in curve(run)] == list(range(1, steps + 1))
    assert curve(run) == curve(whole)
    assert read_metrics(run).of("held_out")[-1]["metrics"] == read_metrics(whole).of("held_out")[-1]["metrics"]
    assert stored(run / LAST) == stored(whole / LAST)
    assert stored(run / "final_model") == stored(whole / "final_model")


def test_a_kill_in_each_phase_of_midtraining_leaves_no_trace(
    mother: Mother, finish: Finish, nano: Nano, small: Path, tmp_path: Path
) -> None:
    _campaign(mother, finish, nano, small, tmp_path, "midtrain", steps=SHORT, each=1, ranks=1)


@pytest.mark.campaign
@pytest.mark.parametrize("ranks", [1, 2], ids=["1 rank", "2 ranks"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_campaign_of_thirty_kills_of_a_run_from_weights_leaves_no_trace(
    mother: Mother, finish: Finish, nano: Nano, small: Path, tmp_path: Path, stage: str, ranks: int
) -> None:
    _campaign(mother, finish, nano, small, tmp_path, stage, steps=LONG, each=6, ranks=ranks)
