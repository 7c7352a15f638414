"""Setting a run up: what is refused before the weights are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.plan import devices
from argonne.stages import stage
from argonne.stages.pretrain import run
from argonne.stages.sft import SFT

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
