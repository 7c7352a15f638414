"""Pipelines: shapes that change on the way, checkpoints that go on on any other mesh, every
stage of the way, the one export.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne import cli
from argonne.config import ParallelSection, Recipe
from argonne.errors import InputError
from argonne.keys import check_mesh
from argonne.layout import FINAL_MODEL, MODEL_CONFIG
from argonne.parallel.launch import WorkerFailed
from argonne.recipe import load_recipe, to_toml
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from argonne.stages.session import run_session
from argonne.stages.setup import Session
from argonne.train.checkpoint import LAST
from tests.parallel.faults import Fault
from tests.parallel.test_sharded import chat_stage_is_that_of_one_process, load_all, same_curve
from tests.train.helpers import curve, stage_of, stored

Nano = Callable[..., Recipe]
Chat = Callable[..., Recipe]


def mesh(pipeline: int, **others: int | str) -> dict[str, str]:
    degrees = {"pipeline": pipeline, "replicate": 1, "shard": 1, "tensor": 1, **others}
    workers = 1
    for name in ("pipeline", "replicate", "shard", "tensor"):
        workers *= int(degrees[name])
    found = {f"parallel.{name}": str(degree) for name, degree in degrees.items()}
    if "schedule" in others:
        found["parallel.schedule"] = f'"{others["schedule"]}"'
    return {**found, "parallel.nproc": str(workers), "parallel.timeout": "60s"} if workers > 1 else {}


def test_a_checkpoint_of_four_ranks_goes_on_in_a_pipeline_then_alone_then_on_three_as_if_nothing_had_changed(
    nano: Nano, tmp_path: Path
) -> None:
    run(nano(), tmp_path / "whole")
    ways = ((3, mesh(1, shard=2, tensor=2)), (6, mesh(2)), (9, {}), (None, mesh(1, replicate=3)))
    for stop, degrees in ways:
        run(nano(**degrees), tmp_path / "cut", stop_after_step=stop)
    for mine, theirs in zip(curve(tmp_path / "cut"), curve(tmp_path / "whole"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["tokens"] == theirs["tokens"]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_rows_that_change_on_the_way_train_as_on_one_process(nano: Nano, tmp_path: Path, schedule: str) -> None:
    # 10 rows are 5, then 8 micro-batches of 2, then longer rows are 2, and at last 3 with a row that only fills up;
    # evaluation reads 4 at once.
    asked = {"model.num_hidden_layers": "4"}
    asked |= {"batch.tokens_per_step": "320", "batch.micro": "2", "train.steps": "6", "eval.every_steps": "2"}
    asked["batch.steps"] = (
        "[{ step = 2, tokens_per_step = 512 }, { step = 3, tokens_per_step = 256, sequence_length = 64 }, "
        "{ step = 5, tokens_per_step = 320, sequence_length = 64 }]"
    )
    run(nano(**asked), tmp_path / "one")
    run(nano(**asked, **mesh(2, schedule=schedule)), tmp_path / "two")
    same_curve(tmp_path / "two", tmp_path / "one", 1e-4)
    held = [[record["loss"] for record in read_metrics(tmp_path / name).of("held_out")] for name in ("one", "two")]
    assert held[0] == pytest.approx(held[1], rel=1e-5)
    assert len(held[0]) == 3


def test_it_samples_from_its_checkpoints_and_says_which_layers_lie_where(nano: Nano, tmp_path: Path) -> None:
    asked = {"train.steps": "4", "model.num_hidden_layers": "3"}
    run(nano(**asked), tmp_path / "one")
    (tmp_path / "recipe.toml").write_text(to_toml(nano(**asked, **mesh(2))))
    command = [sys.executable, "-m", "argonne", "pretrain", str(tmp_path / "recipe.toml"), "--run", "two"]
    told = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stderr
    assert "(1 copies in 2 parts), 2 stages, 1f1b, idle 33% of a step" in told
    assert "pipeline: layers 0-1 | 2" in told
    samples = [[record["text"] for record in read_metrics(tmp_path / name).of("sample")] for name in ("one", "two")]
    assert samples[0] == samples[1] != []


@pytest.mark.campaign
def test_the_export_is_the_one_model_that_the_checkpoint_holds(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "one")
    run(nano(**mesh(2, shard=2)), tmp_path / "four")
    exported = tmp_path / "four" / FINAL_MODEL
    assert load_all(exported) == load_all(tmp_path / "four" / LAST)
    assert stored(exported).keys() == stored(tmp_path / "one" / FINAL_MODEL).keys()
    configs = [(tmp_path / name / FINAL_MODEL / MODEL_CONFIG).read_text() for name in ("one", "four")]
    assert configs[0] == configs[1]


@pytest.mark.campaign
@pytest.mark.parametrize("degrees", [{"schedule": "gpipe"}, {"tensor": 2}], ids=str)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_chat_stage_gives_the_curve_of_one_process(
    chat: Chat, tmp_path: Path, stage: str, degrees: dict[str, int | str]
) -> None:
    chat_stage_is_that_of_one_process(chat, tmp_path, stage, mesh(2, **degrees))


@pytest.mark.campaign
def test_a_run_with_dropout_stopped_and_resumed_equals_one_uninterrupted_bit_for_bit(
    nano: Nano, tmp_path: Path
) -> None:
    recipe = nano("nano-1.0", **mesh(2), **{"model.hidden_dropout": "0.1", "checkpoint.asynchronous": "true"})
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "cut", stop_after_step=5)
    run(recipe, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert load_all(tmp_path / "cut" / LAST) == load_all(tmp_path / "whole" / LAST)


@pytest.mark.campaign
def test_under_autocast_and_compiled_the_curve_is_that_of_one_process(nano: Nano, tmp_path: Path) -> None:
    asked = {"train.precision": '"bf16"', "train.compile": '"on"', "train.steps": "4"}
    run(nano(**asked), tmp_path / "one")
    run(nano(**asked, **mesh(2)), tmp_path / "two")
    same_curve(tmp_path / "two", tmp_path / "one", 1e-2)


@pytest.mark.campaign
def test_in_bf16_alone_the_curve_is_near_that_of_one_process(nano: Nano, tmp_path: Path) -> None:
    asked = {"train.precision": '"bf16_full"', "train.steps": "4"}
    run(nano(**asked), tmp_path / "one")
    run(nano(**asked, **mesh(2, shard=2)), tmp_path / "four")
    same_curve(tmp_path / "four", tmp_path / "one", 3e-2)


def test_wrong_input_found_in_one_stage_ends_all_with_it(nano: Nano, tmp_path: Path) -> None:
    stage = stage_of(Fault("wrong input", rank=1, call=3, mark=tmp_path / "fired"))
    with pytest.raises(InputError, match="a planted one"):
        run_session(Session(nano(**mesh(2)), tmp_path / "run", stage))


def test_a_compiler_that_fails_in_one_stage_ends_the_run_and_says_what_to_set(nano: Nano, tmp_path: Path) -> None:
    stage = stage_of(Fault("compiler", rank=1, call=3, mark=tmp_path / "fired"))
    with pytest.raises(InputError, match=r'in a stage of the pipeline; set train.compile = "off"'):
        run_session(Session(nano(**mesh(2)), tmp_path / "run", stage))


def test_a_tied_weight_whose_two_ends_differ_is_not_saved(nano: Nano, tmp_path: Path) -> None:
    stage = stage_of(Fault("weight", rank=1, call=3, mark=tmp_path / "fired"))
    recipe = nano(**mesh(2), **{"parallel.max_restarts": "0"})
    with pytest.raises(WorkerFailed, match=r"model\.embed_tokens\.weight on rank 1 differs"):
        run_session(Session(recipe, tmp_path / "run", stage))
    assert list((tmp_path / "run").glob("checkpoint_step_*")) == []


@pytest.mark.campaign
def test_a_stage_that_fails_lets_all_start_again_from_the_last_checkpoint(nano: Nano, tmp_path: Path) -> None:
    stage = stage_of(Fault("raise", rank=1, call=11, mark=tmp_path / "fired"))  # two micro-batches a step
    run_session(Session(nano(**mesh(2)), tmp_path / "run", stage))
    run(nano(), tmp_path / "one")
    same_curve(tmp_path / "run", tmp_path / "one", 1e-4)


def test_more_stages_than_layers_of_the_weights_are_refused_before_any_worker_starts(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(nano(**{"train.steps": "4"}), tmp_path / "run")
    monkeypatch.setattr("argonne.stages.session.run_workers", None)
    recipe = load_recipe("argonne-3.0-continue", {"model.init_from": str(tmp_path / "run"), "parallel.pipeline": "3"})
    with pytest.raises(InputError, match="found 3, expected at most 2 stages"):
        run(dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, nproc=3)), tmp_path / "more")


@pytest.mark.campaign
def test_rank_0_reads_for_all_and_muon_trains_as_on_one_process(nano: Nano, tmp_path: Path) -> None:
    asked = {"data.reader": '"rank-0"', "optim.name": '"muon"', "train.steps": "4"}
    run(nano(**asked), tmp_path / "one")
    run(nano(**asked, **mesh(2, replicate=2)), tmp_path / "four")
    same_curve(tmp_path / "four", tmp_path / "one", 1e-4)


@pytest.mark.parametrize(
    ("degrees", "told"),
    [
        ({"pipeline": 3}, "a pipeline of 1 or 2 or 4"),
        ({"pipeline": 2, "tensor": 4}, "a pipeline x tensor of 1 or 2 or 4"),
        ({"pipeline": 2, "shard": 4}, "2 x 1 x 2 or 1 x 2 x 2"),
        ({"pipeline": 2, "context": 2}, "expected one of them to be 1"),
    ],
)
def test_degrees_that_cannot_be_are_refused(degrees: dict[str, int], told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_mesh(ParallelSection(**degrees), 4)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--parallel.pipeline", "3"], "parallel.pipeline: found 3, expected at most 2 stages"),
        (["--parallel.pipeline", "2", "--parallel.schedule", "interleaved"], "found 2 x 2 stages a worker, expected"),
        (["--parallel.pipeline", "2", "--train.precision", "fp16"], "train.precision: found fp16, expected bf16 or"),
        (["--parallel.schedule", "gpipe"], "it acts only with parallel.pipeline != 1"),
    ],
)
def test_the_command_refuses_what_no_pipeline_can_do_before_any_worker_starts(
    nano: Nano,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    told: str,
) -> None:
    monkeypatch.setattr("argonne.stages.session.run_workers", None)
    (tmp_path / "recipe.toml").write_text(to_toml(nano()))
    assert cli.main(["pretrain", str(tmp_path / "recipe.toml"), "--run", str(tmp_path / "run"), *flags]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
