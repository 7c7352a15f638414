"""Tensor parallelism: which degrees fit, checkpoints that go on on any other mesh, every stage, the one export."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from argonne import cli
from argonne.config import ParallelSection, Recipe
from argonne.errors import InputError
from argonne.keys import check_heads, check_mesh
from argonne.layout import FINAL_MODEL, MODEL_CONFIG
from argonne.parallel.mesh import Mesh
from argonne.parallel.tensor import OwnMasks, own_heads
from argonne.recipe import to_toml
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from argonne.stages.session import run_session
from argonne.stages.setup import Session
from argonne.train.checkpoint import LAST
from argonne.train.trainer import Trainer
from tests.parallel.faults import Fault
from tests.parallel.test_sharded import chat_stage_is_that_of_one_process, load_all, same_curve
from tests.train.helpers import curve, stage_of, stored

Nano = Callable[..., Recipe]
Chat = Callable[..., Recipe]


def mesh(replicate: int, shard: int, tensor: int) -> dict[str, str]:
    degrees = {"replicate": replicate, "shard": shard, "tensor": tensor}
    workers = replicate * shard * tensor
    found = {f"parallel.{name}": str(degree) for name, degree in degrees.items()}
    return {**found, "parallel.nproc": str(workers), "parallel.timeout": "60s"} if workers > 1 else {}


def test_a_checkpoint_goes_on_with_and_without_tensor_parallelism_as_if_nothing_had_changed(
    nano: Nano, tmp_path: Path
) -> None:
    run(nano(), tmp_path / "whole")
    for stop, degrees in ((3, (1, 2, 2)), (6, (1, 1, 1)), (9, (1, 1, 2)), (None, (1, 2, 1))):
        run(nano(**mesh(*degrees)), tmp_path / "cut", stop_after_step=stop)
    for mine, theirs in zip(curve(tmp_path / "cut"), curve(tmp_path / "whole"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["tokens"] == theirs["tokens"]


@pytest.mark.campaign
def test_the_export_is_the_one_model_that_the_checkpoint_holds(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "one")
    run(nano(**mesh(1, 2, 2)), tmp_path / "four")
    exported = tmp_path / "four" / FINAL_MODEL
    assert load_all(exported) == load_all(tmp_path / "four" / LAST)
    assert cli.main(["export", str(tmp_path / "four" / LAST), "--as", "hf", "--out", str(tmp_path / "again")]) == 0
    assert stored(tmp_path / "again") == stored(exported)
    assert stored(exported).keys() == stored(tmp_path / "one" / FINAL_MODEL).keys()
    configs = [(tmp_path / name / FINAL_MODEL / MODEL_CONFIG).read_text() for name in ("one", "four")]
    assert configs[0] == configs[1]


@pytest.mark.campaign
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_chat_stage_gives_the_curve_of_one_process(chat: Chat, tmp_path: Path, stage: str) -> None:
    chat_stage_is_that_of_one_process(chat, tmp_path, stage, mesh(1, 1, 2))


@pytest.mark.campaign
def test_a_run_with_dropout_stopped_and_resumed_equals_one_uninterrupted_bit_for_bit(
    nano: Nano, tmp_path: Path
) -> None:
    recipe = nano("nano-1.0", **mesh(1, 1, 2), **{"model.hidden_dropout": "0.1"})
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "cut", stop_after_step=5)
    run(recipe, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert load_all(tmp_path / "cut" / LAST) == load_all(tmp_path / "whole" / LAST)


@pytest.mark.campaign
def test_under_autocast_and_compiled_the_curve_is_that_of_one_process(nano: Nano, tmp_path: Path) -> None:
    asked = {"train.precision": '"bf16"', "train.compile": '"on"', "train.steps": "4"}
    run(nano(**asked), tmp_path / "one")
    run(nano(**asked, **mesh(1, 1, 2)), tmp_path / "two")
    same_curve(tmp_path / "two", tmp_path / "one", 1e-2)


@pytest.mark.campaign
def test_an_overflow_of_fp16_on_one_rank_skips_the_step_on_all(nano: Nano, tmp_path: Path) -> None:
    half = {"train.precision": '"fp16"', "train.steps": "4"}  # of two micro-batches each
    stage = stage_of(Fault("inf", rank=1, call=3, mark=tmp_path / "fired"))
    run_session(Session(nano(**half, **mesh(1, 1, 2)), tmp_path / "two", stage))
    assert [record["step"] for record in read_metrics(tmp_path / "two").of("skip")] == [2]
    assert all(math.isfinite(record["loss"]) for record in curve(tmp_path / "two")[2:])


@pytest.mark.campaign
def test_rank_0_reads_for_all_and_muon_trains_as_on_one_process(nano: Nano, tmp_path: Path) -> None:
    asked = {"data.reader": '"rank-0"', "optim.name": '"muon"', "train.steps": "4"}
    run(nano(**asked), tmp_path / "one")
    run(nano(**asked, **mesh(2, 1, 2)), tmp_path / "four")
    same_curve(tmp_path / "four", tmp_path / "one", 1e-4)
    samples = [[record["text"] for record in read_metrics(tmp_path / name).of("sample")] for name in ("one", "four")]
    assert samples[0] == samples[1] != []


@pytest.mark.parametrize(
    ("degrees", "fits"),
    [
        ({"tensor": 3}, "a tensor of 1 or 2 or 4"),
        ({"tensor": 2, "shard": 4}, "2 x 1 x 2 or 1 x 2 x 2"),
        ({"tensor": 2, "replicate": 4}, "2 x 1 x 2 or 1 x 2 x 2"),
    ],
)
def test_degrees_that_are_not_the_number_of_workers_are_refused(degrees: dict[str, int], fits: str) -> None:
    with pytest.raises(InputError, match=f"on 4 workers, expected degrees whose product is 4: {fits}"):
        check_mesh(ParallelSection(**degrees), 4)


def test_each_rank_of_a_group_draws_its_own_randomness() -> None:
    def seed(rank: int, degree: int) -> int:
        data = SimpleNamespace(samples_before=lambda step: 8 * step, rows=lambda step: 8)
        asked: Any = SimpleNamespace(
            recipe=SimpleNamespace(seed=444), data=data, mesh=Mesh(torch.device("cpu"), rank, 4, inner=degree)
        )
        return Trainer._seed_of(asked, 3)

    assert len({seed(rank, 2) for rank in range(4)}) == 4
    assert seed(0, 2) == seed(0, 1)


def test_a_rank_drops_out_of_its_own_tokens_by_its_own_seed() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        group = init_device_mesh("cpu", (2,))
        dropout = parallelize_module(nn.Dropout(0.5), group, OwnMasks())
        own = torch.ones(1, 3, 8)  # of five tokens
        stream = DTensor.from_local(own, group, [Shard(1)], shape=torch.Size((1, 5, 8)), stride=(40, 8, 1))
        torch.manual_seed(444)
        found = dropout(stream)
        torch.manual_seed(444)
        assert torch.equal(found.to_local(), nn.functional.dropout(own, 0.5))
        assert found.shape == (1, 5, 8)
        assert dropout.eval()(stream).to_local().equal(own)
    finally:
        dist.destroy_process_group()


def test_heads_that_cannot_be_dealt_are_refused_with_the_degrees_that_fit() -> None:
    with pytest.raises(InputError, match=r"parallel.tensor: found 4, .* divides the 6 attention heads: 1, 2, 3, 6$"):
        check_heads(6, 4)


def test_the_command_refuses_them_before_any_worker_starts(
    nano: Nano, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argonne.stages.session.run_workers", None)
    (tmp_path / "recipe.toml").write_text(to_toml(nano()))
    command = ["pretrain", str(tmp_path / "recipe.toml"), "--run", str(tmp_path / "run"), "--parallel.tensor", "5"]
    assert cli.main(command) == 2
    assert "attention heads" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("queries", "keys", "degree", "expected"),
    [
        (8, 2, 4, [[0], [0], [1], [1]]),
        (6, 2, 3, [[0], [0, 1], [1]]),
        (12, 4, 3, [[0, 0, 0, 1], [1, 1, 2, 2], [2, 3, 3, 3]]),
        (6, 3, 2, [[0, 0, 1], [1, 2, 2]]),
    ],
)
def test_a_rank_reads_the_keys_of_its_queries(queries: int, keys: int, degree: int, expected: list[list[int]]) -> None:
    found = [own_heads(queries, keys, degree, rank) for rank in range(degree)]
    # Two heads that two queries each read come once each.
    assert found == [[1, 2] if heads == [1, 1, 2, 2] else heads for heads in expected]
