"""Disks that lack something, through the real command."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.layout import last_checkpoint
from argonne.recipe import to_toml
from argonne.train.checkpoint import LAST
from tests.crash.conftest import Mother
from tests.crash.killing import Watcher
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
Finish = Callable[..., None]


@pytest.mark.parametrize("plant", ["no_links", "full_disk_once_at_step_8"])
def test_a_run_is_stopped_and_resumed_on_a_disk_that_lacks_something(
    mother: Mother, finish: Finish, nano: Nano, tmp_path: Path, plant: str
) -> None:
    recipe = nano(**{"train.steps": "40", "checkpoint.asynchronous": "true"})
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["pretrain", str(tmp_path / "recipe.toml"), "--run", str(run)]
    pid = mother.command(command, log, plant=plant)
    assert Watcher(run, [pid]).wait_for_step(9), log.read_text()
    mother.send(signal.SIGTERM)
    assert mother.wait() == [3], log.read_text()
    mother.command(command, log, plant=plant)
    assert mother.wait() == [0], log.read_text()
    finish(recipe, tmp_path / "whole")
    assert curve(run) == curve(tmp_path / "whole")
    assert stored(last_checkpoint(run) or run) == stored(tmp_path / "whole" / LAST)
    assert (run / LAST).is_symlink() == (plant != "no_links")
