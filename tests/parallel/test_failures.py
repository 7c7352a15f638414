"""One worker dies, hangs, raises, is asked to stop or computes NaN: the others follow in bounded time and nothing is
lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.errors import Diverged, Stopped
from argonne.parallel.launch import run_workers
from argonne.report.records import read_metrics
from argonne.stages.session import run_session
from argonne.stages.setup import Session
from argonne.train.checkpoint import LAST
from argonne.train.objectives import next_token
from argonne.train.run import STOPPED, RunFolder
from argonne.train.trainer import Outcome
from tests.parallel.faults import Fault
from tests.train.helpers import curve, stage_of, stored

Nano = Callable[..., Recipe]
TWO = {"parallel.nproc": "2", "parallel.timeout": "5s"}
KINDS = ("SIGKILL", "exit", "raise", "SIGSTOP")
# Two copies of the model, each in two parts.
FOUR = {"parallel.nproc": "4", "parallel.shard": "2", "parallel.timeout": "20s"}


def run(recipe: Recipe, folder: Path, fault: Fault | None = None) -> Outcome:
    return run_session(Session(recipe, folder, stage_of(fault or next_token)))


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        *(pytest.param(kind, TWO, id=f"{kind}-two") for kind in KINDS),
        pytest.param("raise", FOUR, id="raise-four"),
        *(pytest.param(kind, FOUR, id=f"{kind}-four", marks=pytest.mark.campaign) for kind in KINDS if kind != "raise"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_restarted_from_the_last_checkpoint_with_nothing_lost(
    nano: Nano, tmp_path: Path, kind: str, mesh: dict[str, str]
) -> None:
    recipe = nano(**mesh, **{"eval.every_steps": "0", "checkpoint.sample_prompt": ""})
    run(recipe, tmp_path / "whole")
    # 256 tokens a step, 4 rows or 2 a rank: one call a step, so call 7 is step 7, after the save at 4.
    assert run(recipe, tmp_path / "hurt", Fault(kind, rank=1, call=7, mark=tmp_path / "fired")).complete
    assert (tmp_path / "fired").exists()
    assert curve(tmp_path / "hurt") == curve(tmp_path / "whole")
    assert stored(tmp_path / "hurt" / LAST) == stored(tmp_path / "whole" / LAST)
    assert [record["step"] for record in read_metrics(tmp_path / "hurt").of("resume")] == [4]
    if kind == "SIGSTOP":
        assert "trainer.py" in (tmp_path / "hurt" / "stacks_rank_0.txt").read_text()


@pytest.mark.parametrize(
    ("mesh", "kind", "told"),
    [
        (TWO, "raise", "worker 1 failed .*a planted fault"),
        (FOUR, "raise", "worker 1 failed .*a planted fault"),
        (FOUR, "SIGKILL", r"worker 1 failed \(exit code -9\)"),
        (TWO, "SIGSTOP", "worker . failed"),
        pytest.param(FOUR, "SIGSTOP", "worker . failed", marks=pytest.mark.campaign),
    ],
)
def test_without_restarts_the_failure_ends_all_and_is_told_in_the_workers_own_words(
    nano: Nano, tmp_path: Path, mesh: dict[str, str], kind: str, told: str
) -> None:
    with pytest.raises(RuntimeError, match=told):
        run(
            nano(**mesh, **{"parallel.max_restarts": "0"}),
            tmp_path / "run",
            Fault(kind, rank=1, call=3, mark=tmp_path / "fired"),
        )


@pytest.mark.parametrize(
    ("kind", "rank", "mesh"),
    [("SIGTERM", 1, TWO), ("SIGUSR1", 0, TWO), ("parent SIGTERM", 0, TWO), ("SIGTERM", 3, FOUR)],
)
def test_a_request_to_one_worker_or_to_the_launcher_stops_all_with_a_checkpoint(
    nano: Nano, tmp_path: Path, kind: str, rank: int, mesh: dict[str, str]
) -> None:
    recipe = nano(**mesh)
    run(recipe, tmp_path / "whole")
    outcome = run(recipe, tmp_path / "cut", Fault(kind, rank=rank, call=5, mark=tmp_path / "fired", parent=os.getpid()))
    assert not outcome.complete
    assert outcome.step < 12
    marker = RunFolder(tmp_path / "cut").marker(STOPPED)
    assert marker is not None
    assert marker["step"] == outcome.step
    assert run(recipe, tmp_path / "cut").complete
    assert stored(tmp_path / "cut" / LAST) == stored(tmp_path / "whole" / LAST)


def test_divergence_is_told_once_and_starts_nothing_again(
    nano: Nano, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = nano(**TWO, **{"optim.max_skipped": "0"})
    with pytest.raises(Diverged, match="had a non-finite gradient"):
        run(recipe, tmp_path / "run", Fault("nan", rank=1, call=3, mark=tmp_path / "fired"))
    assert "start again" not in capfd.readouterr().err
    assert read_metrics(tmp_path / "run").of("resume") == []


@pytest.mark.parametrize("mesh", [TWO, FOUR], ids=["two", "four"])
def test_nan_on_one_rank_skips_the_step_on_all_and_is_counted(nano: Nano, tmp_path: Path, mesh: dict[str, str]) -> None:
    recipe = nano(**mesh, **{"eval.every_steps": "0", "checkpoint.sample_prompt": ""})
    assert run(recipe, tmp_path / "run", Fault("nan", rank=1, call=3, mark=tmp_path / "fired")).complete
    assert [record["step"] for record in read_metrics(tmp_path / "run").of("skip")] == [3]
    assert curve(tmp_path / "run")[-1]["loss"] < curve(tmp_path / "run")[0]["loss"]


def _deaf_to_requests(parent: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.kill(parent, signal.SIGTERM)
    while True:
        signal.pause()


def test_a_worker_that_outlasts_stop_grace_is_killed() -> None:
    with pytest.raises(Stopped, match=r"did not end within 0\.5 s"):
        run_workers(_deaf_to_requests, (os.getpid(),), count=1, max_restarts=0, grace_seconds=0.5)


def test_workers_start_where_the_temporary_folder_has_a_long_name(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    code = (
        "import os; from argonne.parallel.launch import run_workers; "
        "print(len(run_workers(os.getppid, (), count=2, max_restarts=0, grace_seconds=5)))"
    )
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    assert list(folder.iterdir()) == []
