"""What a run tells about itself: spikes, profiles, TensorBoard, precision, and that telling never harms it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from argonne.config import Recipe
from argonne.parallel.objective import Head, Loss, MicroBatch
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from argonne.stages.session import run_session
from argonne.stages.setup import Session
from argonne.train.checkpoint import LAST
from argonne.train.guard import SpikeWatch
from argonne.train.objectives import next_token
from tests.train.helpers import curve, stage_of, stored

Nano = Callable[..., Recipe]


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
    run(nano(**{"log.tensorboard": "true"}), tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    expected = [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in curve(tmp_path / "run")]
    assert [(point.step, point.value) for point in events.Scalars("step/loss")] == expected


def test_a_run_without_tensorboard_says_so_and_trains(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    assert run(nano(**{"log.tensorboard": "true"}), tmp_path / "run").outcome.complete
    assert "tensorboard" in read_metrics(tmp_path / "run").of("warning")[0]["message"]


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


def test_wandb_gets_each_record_under_the_project_asked_for_and_its_failure_costs_nothing(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, float]] = []
    begun: list[dict[str, object]] = []

    class Run:
        def log(self, values: dict[str, float]) -> None:
            logged.append(values)
            if len(logged) == 5:
                raise OSError("the network is gone")

    def init(**given: object) -> Run:
        begun.append(given)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert run(nano(**{"log.wandb": '"small"'}), tmp_path / "run").outcome.complete
    assert begun[0]["project"] == "small"
    assert logged[1]["step/loss"] == curve(tmp_path / "run")[0]["loss"]
    assert len(logged) == 5
    assert any("wandb failed" in record["message"] for record in read_metrics(tmp_path / "run").of("warning"))
