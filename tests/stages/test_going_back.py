"""Within a run: going back, changing keys, and starts that would do nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.layout import COMPLETE, CONFIG
from argonne.recipe import load_recipe
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from argonne.train.checkpoint import LAST, list_checkpoints
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
KEEP = {"checkpoint.keep_last": "9", "checkpoint.sample_prompt": ""}


def steps_of(run: Path) -> list[int]:
    return [saved.step for saved in list_checkpoints(run)]


@pytest.mark.parametrize("cut", [None, 9])
def test_rewind_goes_back_to_a_checkpoint_of_the_run_and_the_rest_is_as_before(
    nano: Nano, tmp_path: Path, cut: int | None, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = nano(**KEEP)
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "run", stop_after_step=cut)
    run(recipe, tmp_path / "run", rewind=4, stop_after_step=5)
    assert steps_of(tmp_path / "run") == [4, 5]
    assert not (tmp_path / "run" / COMPLETE).exists()
    assert "removed checkpoint_step_8 (--rewind 4)" in capfd.readouterr().err
    run(recipe, tmp_path / "run")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert stored(tmp_path / "run" / LAST) == stored(tmp_path / "whole" / LAST)


def test_rewind_to_a_step_without_a_checkpoint_names_those_there_are_and_removes_none(
    nano: Nano, tmp_path: Path
) -> None:
    run(nano(**KEEP), tmp_path / "run", stop_after_step=9)
    with pytest.raises(InputError, match=r"no checkpoint_step_5; checkpoints there: 4, 8, 9"):
        run(nano(**KEEP), tmp_path / "run", rewind=5)
    assert steps_of(tmp_path / "run") == [4, 8, 9]


def test_resume_from_on_a_run_that_began_otherwise_is_refused(nano: Nano, tmp_path: Path) -> None:
    run(nano(**KEEP), tmp_path / "first", stop_after_step=8)
    run(nano(**KEEP), tmp_path / "second", stop_after_step=4)
    with pytest.raises(InputError, match=r"--resume-from .*second exists.*or --rewind N"):
        run(nano(**KEEP), tmp_path / "second", resume_from=tmp_path / "first" / "checkpoint_step_8")


def test_the_command_that_began_a_run_with_resume_from_resumes_it(nano: Nano, tmp_path: Path) -> None:
    run(nano(**KEEP), tmp_path / "first", stop_after_step=8)
    begin = {"resume_from": tmp_path / "first" / "checkpoint_step_4"}
    run(nano(**KEEP), tmp_path / "second", **begin, stop_after_step=6)
    assert run(nano(**KEEP), tmp_path / "second", **begin).outcome.complete


def test_fewer_steps_than_were_trained_are_refused(nano: Nano, tmp_path: Path) -> None:
    run(nano(**KEEP), tmp_path / "run", stop_after_step=8)
    with pytest.raises(InputError, match=r"train: 6 steps, but the run has trained 8; .*--rewind"):
        run(nano(**KEEP, **{"train.steps": "6"}), tmp_path / "run", allow={"train.steps"})


def test_a_change_in_mid_run_is_an_event_and_stays_in_the_history_of_the_configuration(
    nano: Nano, tmp_path: Path
) -> None:
    run(nano(**KEEP), tmp_path / "run", stop_after_step=4)
    run(nano(**KEEP, **{"optim.lr": "1e-3"}), tmp_path / "run", allow={"optim.lr"}, stop_after_step=8)
    run(nano(**KEEP, **{"optim.lr": "1e-3"}), tmp_path / "run")
    events = read_metrics(tmp_path / "run").of("change")
    assert [(row["step"], row["key"], row["old"], row["new"]) for row in events] == [(4, "optim.lr", 0.003, 0.001)]
    text = (tmp_path / "run" / CONFIG).read_text()
    assert text.count("# Changed at step 4, optim.lr: 0.003 -> 0.001\n") == 1
    assert load_recipe(str(tmp_path / "run" / CONFIG)).optim.lr == 0.001
