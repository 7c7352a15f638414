"""`train.precision = "auto"` on a CPU: settled when a run begins, written into it, and what bf16 costs in loss."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.config import Recipe
from argonne.recipe import load_recipe
from argonne.stages import trial
from argonne.stages.pretrain import run
from argonne.train import optim

Nano = Callable[..., Recipe]
WIDE = {"model.hidden_size": "256", "model.num_hidden_layers": "1"}


def precision_of(folder: Path) -> str:
    return load_recipe(str(folder / "config.toml")).train.precision


@pytest.mark.parametrize(("sizes", "found"), [(WIDE, "bf16"), ({}, "fp32")])
def test_a_run_that_begins_on_a_cpu_with_bf16_keeps_what_its_width_is_worth(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, str], found: str
) -> None:
    monkeypatch.setattr(optim, "multiplies_bf16", lambda: True)
    folder = tmp_path / "run"
    assert run(nano(**sizes), folder, stop_after_step=4).outcome.reason
    assert precision_of(folder) == found
    monkeypatch.setattr(optim, "multiplies_bf16", lambda: found != "bf16")  # it goes on where that is otherwise
    assert run(nano(**sizes), folder).outcome.complete
    assert precision_of(folder) == found
    assert json.loads((folder / "manifest.json").read_text())["precision"] == found


def test_a_run_without_it_is_one_in_fp32(nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "multiplies_bf16", lambda: False)
    run(nano(**WIDE, **{"train.steps": "4"}), tmp_path / "run")
    assert precision_of(tmp_path / "run") == "fp32"


def test_plan_measures_both_precisions_here_and_says_which_is_faster(
    nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"fp32": 2.0, "bf16": 1.0}
    monkeypatch.setattr(trial, "timed_steps", lambda recipe, *given, **how: speeds[recipe.train.precision])
    plan, trials = trial.measure(nano(**{"train.precision": '"fp32"'}))
    assert {found.precision: found.chosen for found in trials} == {"fp32": True, "bf16": False}
    assert trials[1].tokens_per_second == 2 * trials[0].tokens_per_second == 256
    assert trials[0].hours == pytest.approx(plan.tokens / 128 / 3600)
    lines = trial.trial_lines(trials)
    assert "bf16" in lines[1]
    assert lines[-1].strip() == "--train.precision bf16 would be 2.00 times as fast"
    speeds["bf16"] = 4.0
    assert "as the recipe" in trial.trial_lines(trial.measure(nano(**{"train.precision": '"fp32"'}))[1])[1]


def test_what_could_not_be_compiled_is_told_and_not_timed(nano: Nano, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: Any, **how: object) -> None:
        def broken(*given: object, **named: object) -> None:
            raise torch._dynamo.exc.InternalTorchDynamoError("planted")

        for layer in model.model.layers:
            layer._compiled_call_impl = broken

    monkeypatch.setattr(trial, "compile_blocks", fails)
    _, trials = trial.measure(nano(**{"train.compile": '"on"'}))
    assert [found.tokens_per_second for found in trials] == [0.0, 0.0]
    assert all("could not be compiled" in line for line in trial.trial_lines(trials)[1:])


def test_a_measured_step_is_one_of_the_real_loop(nano: Nano) -> None:
    _, trials = trial.measure(nano())
    assert all(found.tokens_per_second > 0 for found in trials)


@pytest.mark.campaign
def test_the_final_loss_under_bf16_lies_inside_the_noise_of_five_seeds(nano: Nano, tmp_path: Path) -> None:
    """Pairs of runs with one seed: the mean difference is smaller than the spread of the seeds."""
    losses: dict[str, list[float]] = {"fp32": [], "bf16": []}
    more = {
        "model.num_hidden_layers": "3",
        "data.sequence_length": "128",
        "batch.tokens_per_step": "1024",
        "batch.micro": "8",
        "train.steps": "80",
        "train.threads": "2",
        "eval.every_steps": "0",
        "optim.lr": "2e-3",
    }
    for seed in range(5):
        for precision, found in losses.items():
            folder = tmp_path / f"{precision}-{seed}"
            recipe = nano(**{**WIDE, **more, "seed": str(seed), "train.precision": f'"{precision}"'})
            assert run(recipe, folder).outcome.complete
            records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            found.append([record["loss"] for record in records if record["event"] == "held_out"][-1])
    spread = statistics.stdev(losses["fp32"])
    apart = statistics.mean(losses["bf16"]) - statistics.mean(losses["fp32"])
    print(f"fp32 {losses['fp32']}, bf16 {losses['bf16']}: {apart:+.4f} apart, seeds {spread:.4f}")
    assert abs(apart) < spread
