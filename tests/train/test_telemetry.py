"""What a run tells about itself: spikes, profiles, TensorBoard, precision, and that telling never harms it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from argonne.config import LogSection, Recipe
from argonne.parallel.objective import Head, Loss, MicroBatch
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from argonne.stages.session import run_session
from argonne.stages.setup import Session
from argonne.train import telemetry
from argonne.train.checkpoint import LAST
from argonne.train.guard import SpikeWatch
from argonne.train.objectives import next_token
from argonne.train.telemetry import MetricsLog, step_line
from tests.train.helpers import curve, stage_of, stored

Nano = Callable[..., Recipe]
Said = pytest.CaptureFixture[str]


def test_a_spike_is_told_with_the_usual_loss_and_noise_is_not() -> None:
    watch = SpikeWatch()
    generator = torch.Generator().manual_seed(0)
    noise = (3 + 0.1 * torch.randn(200, generator=generator)).tolist()
    assert [watch.observe(loss) for loss in noise] == [None] * 200
    assert watch.observe(6.0) == pytest.approx(3.0, abs=0.1)
    assert watch.observe(3.0) is None


def test_a_loss_spike_in_a_run_names_its_step_and_source(nano: Nano, tmp_path: Path) -> None:
    calls = []

    def spiking(head: Head, hidden: torch.Tensor, micro: MicroBatch) -> Loss:
        calls.append(1)
        loss = next_token(head, hidden, micro).total
        return Loss(loss * 5 if len(calls) == 36 else loss)

    run_session(
        Session(
            nano(**{"train.steps": "40", "batch.micro": "8", "eval.windows": "0"}),
            tmp_path / "run",
            stage_of(spiking),
        )
    )
    (warning,) = [record for record in read_metrics(tmp_path / "run").of("warning") if "spike" in record["message"]]
    assert (warning["step"], warning["sources"]) == (36, ["set"])


def test_a_profile_writes_a_trace_and_changes_nothing(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "plain")
    run(nano(), tmp_path / "profiled", profile=True)
    trace = json.loads((tmp_path / "profiled" / "profile" / "trace.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])
    assert stored(tmp_path / "profiled" / LAST) == stored(tmp_path / "plain" / LAST)


def test_tensorboard_has_a_point_for_each_record(nano: Nano, tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    run(nano(**{"log.tensorboard": "true", "train.z_loss": "0.1"}), tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("step/z_loss")) == 12
    expected = [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in curve(tmp_path / "run")]
    assert [(point.step, point.value) for point in events.Scalars("step/loss")] == expected


def test_tensorboard_shows_a_step_that_was_trained_twice_once(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    # Files are read in the order of their names, which tell the second: here each begins in one of its own, as two
    # processes do.
    names = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(names, "time", SimpleNamespace(time=partial(next, itertools.count(1_700_000_000))))
    run(nano(**{"log.tensorboard": "true"}), tmp_path / "run", stop_after_step=7)
    shutil.rmtree(tmp_path / "run" / "checkpoint_step_7")  # as if the run had been killed there
    run(nano(**{"log.tensorboard": "true"}), tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("step/loss")] == list(range(1, 13))


@pytest.mark.parametrize(
    ("key", "value", "module"),
    [
        ("log.tensorboard", "true", "torch.utils.tensorboard.writer"),
        ("log.wandb", '"small"', "wandb"),
        ("log.trackio", '"small"', "trackio"),
    ],
)
def test_a_run_without_a_library_it_was_to_write_with_says_so_and_trains(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Said, key: str, value: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert run(nano(**{key: value}), tmp_path / "run").outcome.complete
    name = key.removeprefix("log.")
    (warning,) = read_metrics(tmp_path / "run").of("warning")
    assert f"{name} is off" in warning["message"]
    assert capfd.readouterr().err.count(f"warning: {warning['message']}") == 1


def test_where_tensorboard_is_not_installed_nothing_is_said_of_it(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert run(nano(**{"log.tensorboard": "true"}), tmp_path / "run").outcome.complete
    assert read_metrics(tmp_path / "run").of("warning") == []


def test_an_idle_night_is_no_work_though_a_library_is_missing_the_next_day(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    recipe = nano(**{"log.tensorboard": "true"})
    run(recipe, tmp_path / "run", stop_after_step=4)
    a_day_later = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + 86400)
    monkeypatch.setattr(telemetry, "time", a_day_later)
    run(recipe, tmp_path / "run")
    hours = read_metrics(tmp_path / "run").hours
    assert hours is not None
    assert hours < 1


def test_a_source_of_a_mixture_has_its_own_tokens_passes_and_loss(nano: Nano, tmp_path: Path, tokens: Path) -> None:
    from argonne.prepare.options import PrepareOptions
    from argonne.prepare.prepare import prepare

    text = tmp_path / "other.txt"
    text.write_text("".join(f"the same few words again and again, number {number}.\n" for number in range(1000)))
    other = prepare(
        PrepareOptions(
            input=(str(text),),
            out=tmp_path / "other",
            tokenizer=tokens / "tokenizer",
            workers=1,
            split="lines",
            hold_out=0.2,
        )
    )
    sources = (
        f"[{{ path = {json.dumps(str(tokens))}, weight = 3.0 }}, "
        f"{{ path = {json.dumps(str(other))}, weight = 1.0, max_epochs = 9 }}]"
    )
    run(nano(**{"data.sources": sources, "eval.windows": "64"}), tmp_path / "run")
    last = read_metrics(tmp_path / "run").of("step")[-1]["sources"]
    assert {name: row["tokens"] for name, row in last.items()} == {"set": 12 * 192, "other": 12 * 64}
    assert last["other"]["loss"] < last["set"]["loss"]
    assert last["other"]["passes"] > last["set"]["passes"] > 0
    held_out = read_metrics(tmp_path / "run").of("held_out")[-1]
    assert held_out["sources"]["other"]["loss"] < held_out["sources"]["set"]["loss"]
    whole = sum(part["loss"] * part["tokens"] for part in held_out["sources"].values())
    assert whole == pytest.approx(held_out["loss"] * held_out["tokens"], rel=1e-5)


def test_fp16_keeps_its_loss_scale_in_the_checkpoint(nano: Nano, tmp_path: Path) -> None:
    recipe = nano(**{"train.precision": "fp16"})
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "cut", stop_after_step=7)
    state = json.loads((tmp_path / "cut" / LAST / "state.json").read_text())
    assert state["progress"]["scaler"]["scale"] > 1
    run(recipe, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert stored(tmp_path / "cut" / LAST) == stored(tmp_path / "whole" / LAST)


def test_weights_in_bf16_throughout_are_what_was_asked_for(nano: Nano, tmp_path: Path) -> None:
    run(nano(**{"train.precision": "bf16_full"}), tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["precision"], manifest["parameter_dtypes"]) == ("bf16_full", ["bfloat16"])
    assert curve(tmp_path / "run")[-1]["loss"] < curve(tmp_path / "run")[0]["loss"]


def test_deterministic_asks_torch_for_it_during_the_run_and_only_then(nano: Nano, tmp_path: Path) -> None:
    asked = []

    def watching(head: Head, hidden: torch.Tensor, micro: MicroBatch) -> Loss:
        asked.append(torch.are_deterministic_algorithms_enabled())
        return next_token(head, hidden, micro)

    run_session(Session(nano(**{"train.deterministic": "true"}), tmp_path / "run", stage_of(watching)))
    assert set(asked) == {True}
    assert not torch.are_deterministic_algorithms_enabled()


class Tracker:
    """A stand-in for the module of wandb or trackio: what it was given, in order."""

    def __init__(self, fails_at: str = "") -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails_at = fails_at

    def init(self, **given: Any) -> Tracker:
        self._called("init", given)
        return self

    def log(self, values: dict[str, float], **more: Any) -> None:
        self._called("log", {**values, **more})

    def finish(self) -> None:
        self._called("finish", {})

    def _called(self, name: str, given: dict[str, Any]) -> None:
        self.calls.append((name, given))
        if name == self.fails_at and (name != "log" or len(self.calls) == 6):
            raise OSError("the network is gone")


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_tracker_gets_the_recipe_a_name_that_a_resume_finds_again_each_record_and_an_end(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, library, tracker)
    recipe = nano(**{f"log.{library}": '"small"'})
    run(recipe, tmp_path / "run", stop_after_step=5)
    first, tracker.calls = tracker.calls, []
    run(recipe, tmp_path / "run")
    begun, again = first[0][1], tracker.calls[0][1]
    assert begun["project"] == "small"
    assert begun["config"]["optim"]["lr"] == recipe.optim.lr
    run_id = json.loads((tmp_path / "run" / "manifest.json").read_text())["run_id"]
    assert begun["resume"] == "allow"
    assert (begun["name"], begun["id"]) == ("run", run_id) if library == "wandb" else run_id in begun["name"]
    assert again == begun
    losses = [
        (given["step"], given["step/loss"])
        for name, given in first + tracker.calls
        if name == "log" and "step/loss" in given
    ]
    assert losses == [(row["step"], row["loss"]) for row in curve(tmp_path / "run")]
    assert [name for name, _ in first].count("finish") == 1
    assert first[-1][0] == tracker.calls[-1][0] == "finish"


@pytest.mark.parametrize("library", ["wandb", "trackio"])
@pytest.mark.parametrize("fails_at", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_told_once_on_the_terminal_and_in_the_record_and_costs_nothing(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Said, library: str, fails_at: str
) -> None:
    tracker = Tracker(fails_at)
    monkeypatch.setitem(sys.modules, library, tracker)
    assert run(nano(**{f"log.{library}": '"small"'}), tmp_path / "run").outcome.complete
    assert tracker.calls[-1][0] == fails_at  # nothing is asked of it afterwards
    assert len(curve(tmp_path / "run")) == 12
    (warning,) = read_metrics(tmp_path / "run").of("warning")
    assert warning["message"].startswith(library)
    assert capfd.readouterr().err.count(f"warning: {warning['message']}") == 1


def test_two_trackers_that_fail_at_once_are_each_told_once(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, library, Tracker("log"))
    assert run(nano(**{"log.wandb": '"small"', "log.trackio": '"small"'}), tmp_path / "run").outcome.complete
    told = [record["message"].split()[0] for record in read_metrics(tmp_path / "run").of("warning")]
    assert sorted(told) == ["trackio", "wandb"]


def test_a_warning_goes_to_the_terminal_and_into_the_record(tmp_path: Path, capfd: Said) -> None:
    log = MetricsLog(tmp_path, LogSection())
    log.warn(3, "checkpoint not written", path="x")
    log.close()
    assert capfd.readouterr().err == "warning: checkpoint not written\n"
    (warning,) = read_metrics(tmp_path).of("warning")
    assert (warning["step"], warning["path"]) == (3, "x")


LOGGED = {
    "step": 46,
    "loss": 5.1346,
    "lr": 0.00175,
    "grad_norm": 12.97,
    "tokens_per_second": 125_860.0,
    "tokens_per_second_mean": 124_730.0,
    "mfu": 0.4123,
    "memory_gb": 61.25,
    "tokens": 1_234_567_890,
    "metrics": {"accuracy": 0.6123},
}


def test_a_step_is_told_whole_where_there_is_no_terminal() -> None:
    assert step_line(LOGGED, 100_000, 93784.0) == (
        "step     46/100000  loss 5.1346  lr 0.00175  grad 12.970  126k tok/s (mean 125k)  mfu 41.2%  61.25 GB  "
        "tokens 1.23B  left 1d 2h  accuracy 0.6123"
    )


@pytest.mark.parametrize("columns", [60, 80, 100, 120, 200])
def test_the_line_of_a_step_fits_the_terminal_and_keeps_step_loss_speed_and_time_left(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    line = step_line(LOGGED, 100_000, 93784.0, columns)
    assert "\033[1m5.1346\033[0m" in line
    shown = re.sub(r"\033\[\d*m", "", line)
    assert len(shown) < columns
    assert all(part in shown for part in ("step     46/100000", "loss 5.1346", "126k tok/s", "left 1d 2h"))
    assert ("(mean 125k)" in shown) == (columns == 200)
    assert ("accuracy" in shown) == (columns >= 80)
    monkeypatch.setenv("NO_COLOR", "1")
    assert step_line(LOGGED, 100_000, 93784.0, columns) == shown
