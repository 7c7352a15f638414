"""Setting a run up: what is refused before the weights are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.model.build import build_model, config_from_fields
from argonne.model.products import LinearByOneDNN
from argonne.plan import choose_setup, devices
from argonne.stages import setup, stage
from argonne.stages.pretrain import run
from argonne.stages.sft import SFT
from argonne.stages.start import architecture_fields

Nano = Callable[..., Recipe]


TOLD = {
    "a warmup longer than the tokens": (
        {"train.steps": "none", "train.tokens": "2560", "schedule.warmup": "20"},
        r"schedule\.warmup: found 20 steps, more than the run's 5",
    ),
    "tokens that make no step": ({"train.steps": "none", "train.tokens": "100"}, "100 tokens make no whole step"),
    "a task that is none": ({"eval.tasks": '["sumz"]'}, "did you mean 'sums'"),
    "a task named twice": ({"eval.tasks": '["bpb", "bpb"]'}, "named twice"),
    "another size than the weights'": ({"model.hidden_size": "64"}, r"model\.hidden_size: found 64, but the weights"),
    "nothing held out to evaluate on": ({"chat.hold_out": "0"}, r"eval\.every_steps: .* the data holds nothing out"),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_the_data_is_not_needed_for_is_refused_before_any_is_read(name: str, chat: Nano, tmp_path: Path) -> None:
    def read(*given: object) -> Any:
        raise AssertionError("the data was read")

    told, message = TOLD[name]
    with pytest.raises(InputError, match=message):
        run(chat(**told), tmp_path / "run", stage=replace(SFT, open_data=read))


def test_a_run_that_its_plan_says_cannot_fit_does_not_start_unless_allowed(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "machine_memory", lambda: 3e8)
    recipe = nano(**{"train.steps": "4", "schedule.warmup": "1"})

    def built(*given: object) -> None:
        raise AssertionError("weights were built")

    with monkeypatch.context() as inner:
        inner.setattr(stage.Stage, "weights", built, raising=False)
        with pytest.raises(InputError, match=r"0\.\d+ GB .*0\.2\d GB usable; would fit on .* --allow memory"):
            run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert run(recipe, tmp_path / "run", allow=["memory"]).outcome.complete


@pytest.mark.parametrize(
    ("vendor", "precision", "taken"),
    [("AuthenticAMD", "fp32", True), ("GenuineIntel", "fp32", False), ("AuthenticAMD", "bf16", False)],
)
def test_products_in_fp32_are_onednn_s_on_processors_that_mkl_is_not_made_for(
    nano: Nano, monkeypatch: pytest.MonkeyPatch, vendor: str, precision: str, taken: bool
) -> None:
    monkeypatch.setattr(setup, "vendor", lambda: vendor)
    recipe = nano(**{"train.precision": f'"{precision}"'})
    model = build_model(config_from_fields(architecture_fields(recipe.model)), seed=0)
    setup.configure_model(model, recipe, choose_setup(recipe, devices.running_device("cpu")))
    assert (type(model.lm_head) is LinearByOneDNN) is taken
