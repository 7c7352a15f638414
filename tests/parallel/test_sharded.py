"""Sharded runs: every stage, and checkpoints that go on on any other mesh and are exported as the one model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from argonne import cli
from argonne.config import ParallelSection, Recipe
from argonne.errors import InputError
from argonne.keys import check_mesh
from argonne.layout import FINAL_MODEL, MODEL_CONFIG
from argonne.model.load import load_model
from argonne.parallel.mesh import worker_count
from argonne.recipe import to_toml
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from argonne.stages.session import run_session
from argonne.stages.setup import Session
from argonne.stages.stage import Stage
from argonne.train.checkpoint import LAST
from tests.parallel.faults import Fault
from tests.train.helpers import curve, stage_of, stored
from tests.tuning import pairs, write

Nano = Callable[..., Recipe]
Chat = Callable[..., Recipe]


def mesh(replicate: int, shard: int) -> dict[str, str]:
    if replicate * shard == 1:
        return {}
    return {
        "parallel.nproc": str(replicate * shard),
        "parallel.replicate": str(replicate),
        "parallel.shard": str(shard),
        "parallel.timeout": "60s",
    }


def same_curve(found: Path, expected: Path, relative: float) -> None:
    for mine, theirs in zip(curve(found), curve(expected), strict=True):
        assert mine == pytest.approx(theirs, rel=relative, abs=1e-7)


def test_a_checkpoint_of_four_ranks_goes_on_on_two_then_one_then_three_as_if_nothing_had_changed(
    nano: Nano, tmp_path: Path
) -> None:
    run(nano(), tmp_path / "whole")
    for stop, (replicate, shard) in ((3, (2, 2)), (6, (1, 2)), (9, (1, 1)), (None, (3, 1))):
        run(nano(**mesh(replicate, shard)), tmp_path / "cut", stop_after_step=stop)
    for mine, theirs in zip(curve(tmp_path / "cut"), curve(tmp_path / "whole"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["tokens"] == theirs["tokens"]


def test_a_sharded_run_stopped_and_resumed_equals_one_uninterrupted_bit_for_bit(nano: Nano, tmp_path: Path) -> None:
    recipe = nano("nano-1.0", **mesh(2, 2), **{"model.hidden_dropout": "0.1"})
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "cut", stop_after_step=5)
    run(recipe, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert load_all(tmp_path / "cut" / LAST) == load_all(tmp_path / "whole" / LAST)


def load_all(folder: Path) -> dict[str, bytes]:
    model = load_model(folder).model
    return {name: parameter.detach().numpy().tobytes() for name, parameter in model.named_parameters()}


def test_a_sharded_run_exports_the_one_model_that_its_checkpoint_holds(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "one")
    run(nano(**mesh(2, 2)), tmp_path / "four")
    exported = tmp_path / "four" / FINAL_MODEL
    assert load_all(exported) == load_all(tmp_path / "four" / LAST)
    assert cli.main(["export", str(tmp_path / "four" / LAST), "--as", "hf", "--out", str(tmp_path / "again")]) == 0
    assert stored(tmp_path / "again") == stored(exported)
    assert stored(exported).keys() == stored(tmp_path / "one" / FINAL_MODEL).keys()
    configs = [(tmp_path / name / FINAL_MODEL / MODEL_CONFIG).read_text() for name in ("one", "four")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_chat_stage_on_a_sharded_mesh_gives_the_curve_of_one_process(chat: Chat, tmp_path: Path, stage: str) -> None:
    chat_stage_is_that_of_one_process(chat, tmp_path, stage, mesh(2, 2))


def chat_stage_is_that_of_one_process(chat: Chat, folder: Path, stage: str, degrees: dict[str, str]) -> None:
    """The same curve and held-out losses."""
    made = {"sft": chat, "dpo": lambda **more: chat("nano-3.0-dpo", write(folder / "pairs.jsonl", pairs(60)), **more)}
    for name, more in (("one", {}), ("several", degrees)):
        run_session(Session(made[stage](**more), folder / name, stage_named(stage)))
    same_curve(folder / "several", folder / "one", 1e-3 if stage == "dpo" else 1e-4)
    held = [[record["loss"] for record in read_metrics(folder / name).of("held_out")] for name in ("one", "several")]
    assert held[0] == pytest.approx(held[1], rel=1e-4)


def stage_named(name: str) -> Stage:
    from argonne.stages.dpo import DPO
    from argonne.stages.sft import SFT

    return {"sft": SFT, "dpo": DPO}[name]


def test_longer_rows_within_documents_give_the_curve_of_one_process(nano: Nano, tmp_path: Path) -> None:
    run(nano(**{"train.steps": "4", "model.max_position_embeddings": "32"}), tmp_path / "first")
    longer = {
        "stage": '"midtrain"',
        "model.rope_theta": "1e4",
        "model.init_from": json.dumps(str(tmp_path / "first")),
        "data.sequence_length": "128",
        "data.documents": '"within"',
        "batch.tokens_per_step": "512",
        "train.steps": "4",
    }
    run(nano(**longer), tmp_path / "one")
    run(nano(**longer, **mesh(1, 2)), tmp_path / "two")
    same_curve(tmp_path / "two", tmp_path / "one", 1e-5)


def test_an_overflow_of_fp16_in_the_part_of_one_rank_skips_the_step_on_all(nano: Nano, tmp_path: Path) -> None:
    half = {"train.precision": '"fp16"', "train.steps": "4", "checkpoint.sample_prompt": ""}
    skipped = {}
    for name, call in (("whole", 99), ("faulty", 2)):
        stage = stage_of(Fault("inf", rank=1, call=call, mark=tmp_path / f"fired in {name}"))
        run_session(Session(nano(**half, **mesh(1, 2)), tmp_path / name, stage))
        skipped[name] = [record["step"] for record in read_metrics(tmp_path / name).of("skip")]
    assert (tmp_path / "fired in faulty").exists()
    assert 2 not in skipped["whole"]  # the first scale may be too large for a text
    assert skipped["faulty"] == sorted([*skipped["whole"], 2])
    assert all(math.isfinite(record["loss"]) for record in curve(tmp_path / "faulty")[2:])


@pytest.mark.parametrize(("replicate", "shard", "workers"), [(0, 3, 4), (4, 2, 4), (2, 1, 4), (0, 2, 1), (3, 2, 4)])
def test_degrees_that_are_not_the_number_of_workers_are_refused_with_what_would_fit(
    replicate: int, shard: int, workers: int
) -> None:
    with pytest.raises(InputError, match=rf"on {workers} workers, expected degrees whose product is {workers}"):
        check_mesh(ParallelSection(replicate=replicate, shard=shard), workers)


def test_the_command_refuses_wrong_degrees_before_any_worker_starts(
    nano: Nano, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argonne.stages.session.run_workers", None)
    (tmp_path / "recipe.toml").write_text(to_toml(nano()))
    asked = ["--parallel.nproc", "4", "--parallel.shard", "3"]
    assert cli.main(["pretrain", str(tmp_path / "recipe.toml"), "--run", str(tmp_path / "run"), *asked]) == 2
    assert "expected degrees whose product is 4: 4 x 1 or 2 x 2 or 1 x 4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_gpus_as_many_workers_start_as_the_degrees_need(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_count(ParallelSection(replicate=2, shard=2), "cpu") == 4
    assert worker_count(ParallelSection(shard=2), "cpu") == 2
    assert worker_count(ParallelSection(nproc=3), "cpu") == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert worker_count(ParallelSection(shard=2), "auto") == 8
