"""The seam: stages and modes that the package does not know go through the real command, two ranks, resume and report,
unchanged.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from argonne import cli
from argonne.config import Recipe
from argonne.parallel.parallelise import Mode
from argonne.recipe import to_toml
from argonne.report.records import read_metrics
from argonne.stages import pretrain, setup
from argonne.stages.setup import Session
from argonne.stages.stage import Stage
from argonne.train.checkpoint import LAST
from tests.seam import asking, classifier, modes
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
STAGES = {"classifier": classifier.STAGE, "asking": asking.STAGE, "pretrain": pretrain.PRETRAIN}
TWO = {"parallel.nproc": "2", "parallel.timeout": "60s"}
PIPELINE = {**TWO, "parallel.pipeline": "2", "checkpoint.sample_prompt": ""}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """`argonne pretrain RECIPE --run RUN` as `stage`, spread by `mode`; returns the exit code."""

    def run(recipe: Recipe, name: str, stage: Stage, mode: Mode | None = None, stop_after: int | None = None) -> int:
        def session(**given: Any) -> Session:
            changes: dict[str, Any] = {"stage": stage, "stop_after_step": stop_after} | (
                {"given_mode": mode} if mode else {}
            )
            return setup.Session(**{**given, **changes})

        (tmp_path / "recipe.toml").write_text(to_toml(recipe))
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, "Session", session)
            return cli.main(["pretrain", str(tmp_path / "recipe.toml"), "--run", str(tmp_path / name)])

    return run


@pytest.mark.parametrize("name", ["classifier", "asking"])
def test_a_stage_that_the_package_does_not_know_trains_resumes_and_reports(
    nano: Nano, tmp_path: Path, command: Callable[..., int], name: str
) -> None:
    recipe = nano(**{"train.steps": "40", "checkpoint.every_steps": "20", "optim.lr": "1e-3"})
    assert command(recipe, "whole", STAGES[name]) == 0
    assert command(recipe, "cut", STAGES[name], stop_after=25) == 3
    assert command(recipe, "cut", STAGES[name]) == 0
    assert stored(tmp_path / "cut" / LAST) == stored(tmp_path / "whole" / LAST)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    losses = [record["loss"] for record in curve(tmp_path / "whole")]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert cli.main(["report", str(tmp_path / "whole")]) == 0
    assert read_metrics(tmp_path / "whole").of("held_out")


def test_a_metric_of_a_stage_is_a_mean_over_its_own_count_in_training_and_on_held_out_rows(
    nano: Nano, tmp_path: Path, command: Callable[..., int]
) -> None:
    assert command(nano(), "run", classifier.STAGE) == 0
    metrics = read_metrics(tmp_path / "run")
    assert all(record["metrics"]["accuracy"] * 8 % 1 == 0 for record in metrics.of("step"))  # of 8 rows a step
    (last, *_) = metrics.of("held_out")
    assert (last["sequences"], last["metrics"]["accuracy"] * 4 % 1) == (4, 0)


# Where rank 0 alone reads, the others' data never sees the model: a stage that asks it has every rank read.
@pytest.mark.parametrize(
    ("name", "reader"), [("classifier", "every-rank"), ("classifier", "rank-0"), ("asking", "every-rank")]
)
def test_a_stage_on_two_ranks_gives_the_curve_of_one(
    nano: Nano, tmp_path: Path, command: Callable[..., int], name: str, reader: str
) -> None:
    assert command(nano(), "one", STAGES[name]) == 0
    assert command(nano(**TWO, **{"data.reader": reader}), "two", STAGES[name]) == 0
    same_curve(tmp_path / "one", tmp_path / "two")


def same_curve(one: Path, two: Path) -> None:
    for mine, theirs in zip(curve(one), curve(two), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    held = [[record["loss"] for record in read_metrics(run).of("held_out")] for run in (one, two)]
    assert held[0] == pytest.approx(held[1], rel=1e-5)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_through_a_pipeline_of_two_processes_gives_the_curve_of_one(
    nano: Nano, tmp_path: Path, command: Callable[..., int], name: str
) -> None:
    assert command(nano(), "one", STAGES[name]) == 0
    assert command(nano(**PIPELINE), "pipe", STAGES[name], modes.PIPELINED, stop_after=5) == 3
    assert command(nano(**PIPELINE), "pipe", STAGES[name], modes.PIPELINED) == 0
    same_curve(tmp_path / "one", tmp_path / "pipe")
    exported = [json.loads((tmp_path / run / "manifest.json").read_text())["parameters"] for run in ("one", "pipe")]
    assert exported[0] == exported[1]
    assert stored(tmp_path / "one" / "final_model").keys() == stored(tmp_path / "pipe" / "final_model").keys()


@pytest.mark.parametrize(("optimizer", "background"), [("adamw", "false"), ("muon", "true")])
def test_sharded_parameters_move_and_equal_one_process(
    nano: Nano, tmp_path: Path, command: Callable[..., int], optimizer: str, background: str
) -> None:
    recipe = nano(**{"optim.name": optimizer, "checkpoint.asynchronous": background})
    assert command(recipe, "one", pretrain.PRETRAIN) == 0
    two = dataclasses.replace(recipe, parallel=nano(**TWO, **{"parallel.shard": "2"}).parallel)
    assert command(two, "cut", pretrain.PRETRAIN, stop_after=5) == 3
    assert command(two, "cut", pretrain.PRETRAIN) == 0
    same_curve(tmp_path / "one", tmp_path / "cut")
    samples = [[record["text"] for record in read_metrics(tmp_path / run).of("sample")] for run in ("one", "cut")]
    assert samples[0][-1] == samples[1][-1]
