"""Two containers of one machine: the same host name, the same folder, process ids that mean nothing to one another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.layout import LOCK
from argonne.recipe import to_toml
from tests.crash.conftest import Mother
from tests.crash.killing import Watcher

Nano = Callable[..., Recipe]
APART = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def namespaces() -> bool:
    found = shutil.which("unshare")
    return found is not None and subprocess.run([*APART, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not namespaces(), reason="no PID namespaces may be made here")
def test_a_living_run_is_not_taken_over_from_another_pid_namespace(mother: Mother, nano: Nano, tmp_path: Path) -> None:
    recipe = nano(**{"train.steps": "4000", "log.every_steps": "1", "checkpoint.sample_prompt": ""})
    file, run = tmp_path / "recipe.toml", tmp_path / "run"
    file.write_text(to_toml(recipe))
    arguments = ["pretrain", str(file), "--run", str(run)]
    pid = mother.command(arguments, tmp_path / "log")
    assert Watcher(run, [pid]).wait_for_step(3), (tmp_path / "log").read_text()
    before = (run / LOCK).read_text()
    for extra in ([], ["--take-over"]):
        command = [*APART, sys.executable, "-m", "argonne", *arguments, *extra]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        assert done.returncode == 2
        assert "the run is in use by process" in done.stderr
    assert (run / LOCK).read_text() == before
    mother.kill()
    assert (run / LOCK).exists()
