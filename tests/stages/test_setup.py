"""Setting a run up: what is refused before the weights are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.plan import devices
from argonne.stages import stage
from argonne.stages.pretrain import run

Nano = Callable[..., Recipe]


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
