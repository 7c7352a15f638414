"""Faults on one process that another must survive: ranks of one run, and a second process on the same run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.files import verify_directory
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from argonne.train.checkpoint import LAST, list_checkpoints
from tests.crash.conftest import Mother
from tests.crash.killing import Watcher
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
Finish = Callable[..., None]


def warnings_of(folder: Path) -> list[str]:
    return [record["message"] for record in read_metrics(folder).of("warning")]


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        ("failing_sample", "sampling failed: ValueError: planted"),
        ("hanging_sample", "sampling failed: TimeoutError: took longer than 0.1 s and was given up"),
    ],
)
def test_sampling_that_fails_on_rank_0_neither_stops_nor_changes_two_ranks(
    mother: Mother, finish: Finish, nano: Nano, tmp_path: Path, plant: str, said: str
) -> None:
    recipe = nano(**{"log.telemetry_limit": '"0.1s"', "eval.windows": "0"})
    finish(nano(**{"eval.windows": "0", "checkpoint.sample_prompt": ""}), tmp_path / "whole", ranks=2)
    mother.start(recipe, tmp_path / "run", ranks=2, plant=plant)
    assert mother.wait() == [0, 0], (tmp_path / "run.log").read_text()[-4000:]
    assert warnings_of(tmp_path / "run") == [said] * 3
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert stored(tmp_path / "run" / "final_model") == stored(tmp_path / "whole" / "final_model")


def test_a_disk_that_is_full_for_one_rank_costs_both_the_same_checkpoint(
    mother: Mother, nano: Nano, tmp_path: Path
) -> None:
    recipe = nano(**{"eval.windows": "0", "checkpoint.sample_prompt": ""})
    mother.start(recipe, tmp_path / "run", ranks=2, plant="full_disk_on_rank_1")
    assert mother.wait() == [0, 0], (tmp_path / "run.log").read_text()[-4000:]
    (warning,) = warnings_of(tmp_path / "run")
    assert "No space left on device" in warning
    assert [saved.step for saved in list_checkpoints(tmp_path / "run")] == [4, 12]
    assert verify_directory(tmp_path / "run" / LAST) == []


def test_a_weight_lost_on_one_rank_refuses_the_save_on_both_and_hangs_neither(
    mother: Mother, nano: Nano, tmp_path: Path
) -> None:
    recipe = nano(
        **{
            "eval.windows": "0",
            "checkpoint.sample_prompt": "",
            "checkpoint.every_steps": "2",
            "parallel.timeout": '"20s"',
        }
    )
    mother.start(recipe, tmp_path / "run", ranks=2, plant="nan_weight_on_rank_1")
    codes = mother.wait()
    said = (tmp_path / "run.log").read_text()
    assert codes == [1, 1]
    assert "NonFiniteWeights" in said
    assert "model.embed_tokens.weight" in said
    assert [saved.step for saved in list_checkpoints(tmp_path / "run")] == [2]


def test_a_second_process_on_a_run_is_refused_and_harms_nothing(
    mother: Mother, finish: Finish, nano: Nano, tmp_path: Path
) -> None:
    recipe = nano()
    finish(recipe, tmp_path / "whole")
    (pid,) = mother.start(recipe, tmp_path / "run")
    assert Watcher(tmp_path / "run", [pid]).wait_for_step(2)
    os.kill(pid, signal.SIGSTOP)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(InputError, match=rf"in use by process {pid} on .* started .* give --take-over"):
        run(recipe, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    os.kill(pid, signal.SIGCONT)
    assert mother.wait() == [0]
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert stored(tmp_path / "run" / LAST) == stored(tmp_path / "whole" / LAST)
