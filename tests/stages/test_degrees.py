"""Degrees that are `auto` are settled once, before any worker starts."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from argonne import cli
from argonne.config import Recipe
from argonne.files import read_json
from argonne.layout import COMPUTE_PLAN, CONFIG
from argonne.plan import devices, make_plan
from argonne.recipe import to_toml
from argonne.report.records import read_metrics
from argonne.stages import session
from argonne.stages.pretrain import run
from tests.train.helpers import curve

Nano = Callable[..., Recipe]
AUTO = dict.fromkeys(("parallel.shard", "parallel.tensor", "parallel.pipeline"), "auto")


def workers(count: int, **more: str) -> dict[str, str]:
    return {"parallel.nproc": str(count), "parallel.timeout": "60s", **more}


def never(*given: Any, **more: Any) -> Any:
    raise AssertionError("workers were started")


def parallel_of(folder: Path) -> dict[str, int]:
    found: dict[str, int] = tomllib.loads((folder / CONFIG).read_text())["parallel"]
    return {name: found[name] for name in ("replicate", "shard", "tensor")}


def test_a_run_tells_its_degrees_keeps_them_and_settles_anew_on_other_workers(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(nano(), tmp_path / "one")
    one_way = {"train.activation_checkpointing": "none", "train.loss": "full"}
    copies, shards = (
        make_plan(nano(**one_way, **{f"parallel.{name}": "2"}), gpu="cpu", gpus=2).memory_total
        for name in ("replicate", "shard")
    )
    assert shards < copies
    monkeypatch.setattr(devices, "machine_memory", lambda: (shards + copies) / devices.USABLE)
    run(nano(**workers(2), **AUTO, **one_way), tmp_path / "auto", stop_after_step=3)
    assert "parallel: shard 2 (auto): a step takes 0." in capfd.readouterr().err
    assert parallel_of(tmp_path / "auto") == {"replicate": 1, "shard": 2, "tensor": 1}
    assert read_json(tmp_path / "auto" / COMPUTE_PLAN)["layout"]["shard"] == 2
    monkeypatch.undo()
    run(nano(**workers(2), **AUTO), tmp_path / "auto")
    assert "parallel: replicate 2 (auto)" in capfd.readouterr().err
    changes = {change["key"]: (change["old"], change["new"]) for change in read_metrics(tmp_path / "auto").of("change")}
    assert changes["parallel.shard"] == (2, 1)
    assert parallel_of(tmp_path / "auto") == {"replicate": 2, "shard": 1, "tensor": 1}
    losses = [[record["loss"] for record in curve(tmp_path / name)] for name in ("one", "auto")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_fits_nowhere_ends_with_2_before_any_worker_starts(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "machine_memory", lambda: 3e8)
    monkeypatch.setattr(session, "run_workers", never)
    (tmp_path / "my.toml").write_text(to_toml(nano(**workers(2))))
    words = ["pretrain", str(tmp_path / "my.toml"), "--run", str(tmp_path / "run"), "--parallel.shard", "auto"]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "memory: a step is planned with 0." in said
    assert "GB usable; would fit on" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_several_nodes_count_together_and_a_shard_stays_within_one(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}

    def caught(work: Any, arguments: tuple[Any, ...], **more: Any) -> Any:
        found.update(vars(arguments[0].recipe.parallel), count=more["count"])
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run_workers", caught)
    for name, value in {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyboardInterrupt):
        run(nano(**workers(2), **AUTO), tmp_path / "run")
    assert (found["replicate"], found["shard"], found["tensor"], found["pipeline"], found["count"]) == (4, 1, 1, 1, 2)


def test_on_a_cpu_as_many_workers_start_as_the_numbers_among_the_degrees_need(
    nano: Nano, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(nano(**{"parallel.replicate": "2", "parallel.shard": "auto", "parallel.timeout": "60s"}), tmp_path / "run")
    assert "parallel: replicate 2 (auto)" in capfd.readouterr().err
