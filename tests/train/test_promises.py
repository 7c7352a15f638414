"""Promises of the loop that no fault of a machine tests: rates, ends of runs, speeds, formats, and a step that waits
for nobody.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from argonne.config import Recipe
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from argonne.train import telemetry, trainer
from argonne.train.checkpoint import LAST
from argonne.train.run import COMPLETE, STOPPED, RunFolder
from argonne.train.schedule import learning_rate
from argonne.train.trainer import Trainer
from tests.train.helpers import curve

Nano = Callable[..., Recipe]
QUIET = {"checkpoint.sample_prompt": "", "eval.windows": "0"}


def test_the_first_rate_is_the_curves_at_every_kind_of_start(nano: Nano, tmp_path: Path) -> None:
    recipe = nano(**QUIET)
    run(recipe, tmp_path / "first", stop_after_step=4)
    lower = nano(**QUIET, **{"optim.lr": "1e-4", "schedule.warmup": "0"})
    from_weights = nano(**QUIET, **{"optim.lr": "2e-4", "model.init_from": json.dumps(str(tmp_path / "first"))})
    branch: dict[str, Any] = {"resume_from": tmp_path / "first" / "checkpoint_step_4"}
    starts = [
        (recipe, tmp_path / "fresh", {}, 0),
        (lower, tmp_path / "branch", branch, 4),
        (from_weights, tmp_path / "continued", {}, 0),
        (lower, tmp_path / "first", {"allow": ["optim.lr", "schedule.warmup"]}, 4),
    ]
    for asked, folder, options, step in starts:
        run(asked, folder, stop_after_step=step + 1, **options)
        record = curve(folder)[-1]
        assert (record["step"], record["lr"]) == (step + 1, learning_rate(step, 12, asked.optim, asked.schedule))


def test_a_rate_that_is_not_the_curves_ends_the_run_before_its_first_step(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        trainer, "set_learning_rate", lambda *arguments: None
    )  # as an optimizer that keeps a restored rate
    with pytest.raises(RuntimeError, match="the schedule says"):
        run(nano(**QUIET), tmp_path / "run")
    assert not (tmp_path / "run" / LAST).exists()


def test_a_stopped_run_exports_nothing_and_its_marker_says_where_and_why(nano: Nano, tmp_path: Path) -> None:
    run(nano(**QUIET), tmp_path / "run", stop_after_step=5)
    marker = RunFolder(tmp_path / "run").marker(STOPPED)
    assert marker is not None
    assert (marker["step"], marker["reason"]) == (5, "asked to stop after step 5")
    assert not (tmp_path / "run" / "final_model").exists()
    assert not (tmp_path / "run" / COMPLETE).exists()
    run(nano(**QUIET), tmp_path / "run")
    assert (tmp_path / "run" / "final_model").exists()
    assert not (tmp_path / "run" / STOPPED).exists()


def test_a_complete_run_started_again_does_nothing(nano: Nano, tmp_path: Path) -> None:
    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    run(nano(**QUIET), tmp_path / "run")
    before = state()
    again = run(nano(**QUIET), tmp_path / "run")
    assert (again.outcome.complete, again.outcome.step) == (True, 12)
    assert state() == before


def test_speed_counts_this_sessions_tokens_over_this_sessions_seconds(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(nano(**QUIET), tmp_path / "run", stop_after_step=8)
    begin = iter([100.0])
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(monotonic=lambda: next(begin, 110.0), time=lambda: 0.0))
    run(nano(**QUIET), tmp_path / "run")
    last = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if '"event": "step"' in line
    ][-1]
    assert (last["step"], last["tokens"]) == (12, 12 * 256)
    assert last["tokens_per_second_mean"] == 4 * 256 / 10


def test_speed_and_mfu_of_a_record_are_of_the_interval_since_the_last_one_beside_the_sessions_mean(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(nano(**QUIET), tmp_path / "run", stop_after_step=8)
    clock = iter([100.0, 110.0, 112.0, 116.0, 136.0])
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(monotonic=lambda: next(clock), time=lambda: 0.0))
    monkeypatch.setattr(telemetry, "device_peak_flops", lambda name, precision: 1e9)
    run(nano(**QUIET), tmp_path / "run")
    records = read_metrics(tmp_path / "run").of("step")[-4:]
    assert [record["tokens_per_second"] for record in records] == [25.6, 128.0, 64.0, 12.8]
    assert [record["tokens_per_second_mean"] for record in records] == [25.6, 42.7, 48.0, 28.4]
    flops = [record["mfu"] * 1e9 / record["tokens_per_second"] for record in records]
    assert flops == pytest.approx(flops[:1] * 4)
    assert records[-1]["mfu_mean"] / records[-1]["mfu"] == pytest.approx(1024 / 36 / 12.8)
    assert "12.8 tok/s (mean 28.4)" in capfd.readouterr().err


def test_a_checkpoint_is_safetensors_json_and_toml_and_never_a_pickle(nano: Nano, tmp_path: Path) -> None:
    run(nano(**QUIET), tmp_path / "run", stop_after_step=4)
    names = {path.suffix for path in (tmp_path / "run" / "checkpoint_step_4").rglob("*") if path.is_file()}
    assert names == {".safetensors", ".json", ".toml"}


WAITING = ("_local_scalar_dense", "nonzero", "aten.equal", "is_nonzero", "masked_select", "unique")


class Waits(TorchDispatchMode):
    """Records the operations for which a GPU would make the host wait; they are the same operations on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if any(name in str(function) for name in WAITING):
            self.found.append(str(function))
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_waits_for_nothing_from_the_device(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    waits, plain = Waits(), Trainer._train_step

    def step(self: Trainer, batch: Any, count: int) -> Any:
        with waits:
            return plain(self, batch, count)

    monkeypatch.setattr(Trainer, "_train_step", step)
    monkeypatch.setattr(
        "argonne.model.loss._rows_that_count", lambda targets: None
    )  # what it is on any device but the CPU
    run(nano(**QUIET, **{"optim.name": optimizer, "train.steps": "4"}), tmp_path / "run")
    assert waits.found == []
    with waits:
        assert torch.ones(()).item() == 1
    assert waits.found == ["aten._local_scalar_dense.default"]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_on_a_gpu_waits_for_nothing(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    plain, calls = Trainer._train_step, []

    def step(self: Trainer, batch: Any, count: int) -> Any:
        calls.append(batch.step)
        torch.cuda.set_sync_debug_mode("error" if len(calls) > 1 else "default")  # the first step sets up libraries
        try:
            return plain(self, batch, count)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_train_step", step)
    recipe = nano(**QUIET, **{"optim.name": optimizer, "train.steps": "4", "train.compile": "off"})
    assert run(recipe, tmp_path / "run").outcome.complete
    assert len(calls) == 4
