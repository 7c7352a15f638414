"""One step: the loss does not depend on how the batch is cut; memory and compiler failures change nothing but speed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import Head, Loss, MicroBatch
from argonne.parallel.parallelise import in_one_call
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from argonne.stages.session import run_session
from argonne.stages.setup import Session
from argonne.train.checkpoint import LAST
from argonne.train.micro_batch import MICRO_ROWS_FILE
from argonne.train.objectives import next_token
from argonne.train.optim import Precision
from tests.train.helpers import curve, stage_of, stored

Nano = Callable[..., Recipe]


def gradients(preset: str, sizes: list[int], nano: Nano) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss sum and gradients in float64 of 8 rows cut into `sizes`; rows 2 and 3 train nothing, the others unevenly
    much.
    """
    from argonne.model.build import build_model, config_from_fields
    from argonne.stages.start import architecture_fields

    config = config_from_fields(
        architecture_fields(nano(preset).model) | {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    )
    model = build_model(config, seed=1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (8, 33), generator=generator)
    labels = ids[:, 1:].clone()
    labels[2:4] = -100
    for row in range(8):
        labels[row, : 3 * row] = -100
    rows = {"input_ids": ids[:, :-1], "shift_labels": labels}
    mesh = Mesh(torch.device("cpu"))
    parallelised = in_one_call(model, model, mesh, next_token, Precision("fp32", mesh.device))
    pieces = {name: tensor.split(sizes) for name, tensor in rows.items()}
    micro_batches = [{name: pieces[name][index] for name in rows} for index in range(len(sizes))]
    sums = parallelised.forward_backward(micro_batches, int((labels != -100).sum()))
    return float(sums.total), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("preset", ["nano-1.0", "nano-2.5", "nano-3.0"])
@pytest.mark.parametrize("sizes", [[1] * 8, [2, 2, 2, 2], [3, 5]], ids=str)
def test_loss_and_gradients_do_not_depend_on_the_cut_even_where_a_micro_batch_is_fully_masked(
    nano: Nano, preset: str, sizes: list[int]
) -> None:
    whole_loss, whole = gradients(preset, [8], nano)
    loss, found = gradients(preset, sizes, nano)
    # The sum itself is kept in float32.
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert found.keys() == whole.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-10 * float(expected.abs().max()) + 1e-16)


class OutOnce:
    """An objective that runs out of memory in the backward pass of the second micro-batch of its third step, once."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, head: Head, hidden: torch.Tensor, micro: MicroBatch) -> Loss:
        self.calls += 1
        loss = next_token(head, hidden, micro).total
        if self.calls == 6:
            loss.register_hook(_raise_out_of_memory)
            loss = loss * 1
        return Loss(loss)


def _raise_out_of_memory(gradient: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Planted.")


def test_out_of_memory_in_a_backward_pass_halves_the_micro_batch_and_repeats_the_step(
    nano: Nano, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = nano()
    run(recipe, tmp_path / "whole")
    run_session(Session(recipe, tmp_path / "hurt", stage_of(OutOnce())))
    assert json.loads((tmp_path / "hurt" / MICRO_ROWS_FILE).read_text())["rows"] == 2
    assert "micro-batches of 2 rows from here" in capfd.readouterr().err
    for mine, theirs in zip(curve(tmp_path / "hurt"), curve(tmp_path / "whole"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert curve(tmp_path / "hurt")[:2] == curve(tmp_path / "whole")[:2]


def test_out_of_memory_in_the_optimizer_repeats_the_step(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = nano()
    run(recipe, tmp_path / "whole")
    original, calls = torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW, closure: Any = None) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Planted.")
        return original(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(recipe, tmp_path / "hurt")
    assert len(calls) == 13
    for mine, theirs in zip(curve(tmp_path / "hurt"), curve(tmp_path / "whole"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_out_of_memory_with_a_single_row_says_what_would_help(nano: Nano, tmp_path: Path) -> None:
    def always(head: Head, hidden: torch.Tensor, micro: MicroBatch) -> Loss:
        raise torch.OutOfMemoryError("CUDA out of memory. Planted.")

    with pytest.raises(InputError, match="activation_checkpointing"):
        run_session(Session(nano(), tmp_path / "run", stage_of(always)))


def test_a_later_session_starts_with_the_micro_batch_an_earlier_one_backed_off_to(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "run", stop_after_step=4)
    (tmp_path / "run" / MICRO_ROWS_FILE).write_text('{"rows": 2}')
    run(nano(), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["micro_rows"] == 2


def test_a_compiler_failure_is_told_once_and_training_goes_on_eagerly(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from torch._dynamo.exc import Unsupported

    run(nano(), tmp_path / "eager")

    def compile_to_failure(self: nn.Module, *args: Any, **more: Any) -> None:
        def fail(*values: Any, **named: Any) -> None:
            raise Unsupported("a planted compiler failure")

        self._compiled_call_impl = fail

    monkeypatch.setattr(nn.Module, "compile", compile_to_failure)
    run(nano(**{"train.compile": "on"}), tmp_path / "failed")
    assert capfd.readouterr().err.count("compiling failed, training goes on eagerly") == 1
    assert stored(tmp_path / "failed" / LAST) == stored(tmp_path / "eager" / LAST)
    assert any("compiling failed" in record["message"] for record in read_metrics(tmp_path / "failed").of("warning"))


def test_out_of_memory_while_compiling_backs_off_before_it_gives_up_compiling(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(nano(**{"batch.micro": "2"}), tmp_path / "eager")
    calls: list[int] = []

    def compile_out_of_memory_once(self: nn.Module, *args: Any, **more: Any) -> None:
        def call(*values: Any, **named: Any) -> Any:
            calls.append(len(values[0]))
            if len(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Planted.")
            return self._call_impl(*values, **named)

        self._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", compile_out_of_memory_once)
    run(nano(**{"train.compile": "on"}), tmp_path / "hurt")
    assert calls[:2] == [4, 2]
    assert stored(tmp_path / "hurt" / LAST) == stored(tmp_path / "eager" / LAST)


def test_a_save_in_the_background_writes_what_a_save_in_place_writes(nano: Nano, tmp_path: Path) -> None:
    keep = {"checkpoint.keep_last": "9"}
    run(nano(**keep), tmp_path / "place")
    run(nano(**keep, **{"checkpoint.asynchronous": "true"}), tmp_path / "beside", stop_after_step=9)
    run(nano(**keep, **{"checkpoint.asynchronous": "true"}), tmp_path / "beside")
    for step in (8, 12):
        assert stored(tmp_path / "beside" / f"checkpoint_step_{step}") == stored(
            tmp_path / "place" / f"checkpoint_step_{step}"
        )
    assert {record["step"] for record in read_metrics(tmp_path / "beside").of("checkpoint")} == {4, 8, 9, 12}


def test_evaluation_and_sampling_run_eagerly_beside_compiled_training(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: set[tuple[int, ...]] = set()

    def compile_and_watch(self: nn.Module, *args: Any, **more: Any) -> None:
        def call(*values: Any, **named: Any) -> Any:
            shapes.add(tuple(values[0].shape))
            return self._call_impl(*values, **named)

        self._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", compile_and_watch)
    run(nano(**{"train.compile": "on", "eval.windows": "3"}), tmp_path / "run")
    assert shapes == {(4, 32, 32)}
    assert read_metrics(tmp_path / "run").of("sample")
