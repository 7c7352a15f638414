"""Faults planted in a run, each caught as designed. Kills and crashes of whole processes are in tests/crash."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.config import Recipe
from argonne.errors import Diverged, InputError
from argonne.files import TEMPORARY, verify_directory
from argonne.parallel.objective import Head, Loss, MicroBatch
from argonne.report.records import read_metrics
from argonne.stages import hooks, pretrain
from argonne.stages.pretrain import run
from argonne.train import checkpoint
from argonne.train.aside import Work
from argonne.train.checkpoint import LAST, NonFiniteWeights
from argonne.train.objectives import next_token
from argonne.train.run import LOCK, RunFolder
from argonne.train.telemetry import MetricsLog
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
Said = pytest.CaptureFixture[str]
MICRO_BATCHES = 2  # a step of the nano recipe: 8 rows, 4 a micro-batch
QUIET = {"checkpoint.sample_prompt": "", "eval.windows": "0"}


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`at_step(plant, *steps)`: before the given steps (counted from 1 in this session) call `plant(head)`; it returns
    a factor of the loss.
    """

    def install(plant: Callable[[Head], float], *steps: int) -> None:
        calls = itertools.count()

        def objective(head: Head, hidden: torch.Tensor, micro: MicroBatch) -> Loss:
            call = next(calls)
            first = call % MICRO_BATCHES == 0 and call // MICRO_BATCHES + 1 in steps
            factor = plant(head) if first else 1.0
            return Loss(next_token(head, hidden, micro).total * factor)

        monkeypatch.setattr(pretrain, "next_token", objective)

    return install


def nan(head: Head) -> float:
    return float("nan")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_nan_gradient_is_skipped_counted_and_leaves_weights_and_moments_untouched(
    nano: Nano, tmp_path: Path, at_step: Callable[..., None], optimizer: str
) -> None:
    at_step(nan, 5)
    result = run(
        nano(**{"optim.name": optimizer, "checkpoint.every_steps": "1", "checkpoint.keep_last": "12", **QUIET}),
        tmp_path / "run",
    )
    assert result.outcome.complete
    before, after, later = (stored(tmp_path / "run" / f"checkpoint_step_{step}") for step in (4, 5, 6))
    assert before == after
    assert after != later
    assert [record["step"] for record in read_metrics(tmp_path / "run").of("skip")] == [5]
    assert json.loads((tmp_path / "run" / LAST / "state.json").read_text())["progress"]["skipped"] == 1


def test_too_many_nan_gradients_in_a_row_end_the_run_and_name_the_last_good_checkpoint(
    nano: Nano, tmp_path: Path, at_step: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = nano(**QUIET, **{"optim.max_skipped": "2"})
    run(recipe, tmp_path / "whole")
    with monkeypatch.context():
        at_step(nan, 6, 7, 8, 9)
        with pytest.raises(Diverged, match=r"3 steps in a row.*max_skipped = 2.*checkpoint_step_4"):
            run(recipe, tmp_path / "run")
    monkeypatch.undo()
    run(recipe, tmp_path / "run")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_divergence_names_a_checkpoint_from_before_the_bad_steps_not_one_that_was_saved_among_them(
    nano: Nano, tmp_path: Path, at_step: Callable[..., None]
) -> None:
    at_step(nan, 7, 8, 9)
    recipe = nano(**QUIET, **{"optim.max_skipped": "2"})
    with pytest.raises(Diverged, match=r"3 steps in a row from step 7 on .*checkpoint_step_4: --rewind 4"):
        run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint_step_8").exists()


def test_nan_weights_refuse_the_save_and_the_last_good_checkpoint_stays(
    nano: Nano, tmp_path: Path, at_step: Callable[..., None], capfd: Said
) -> None:
    def spoil(head: Any) -> float:
        with torch.no_grad():
            head.weight.view(-1)[3] = float("nan")
        return 1.0

    at_step(spoil, 6)
    with pytest.raises(NonFiniteWeights, match="embed"):
        run(nano(**QUIET), tmp_path / "run")
    assert "no checkpoint at step 8" in capfd.readouterr().err
    assert [saved.step for saved in checkpoint.list_checkpoints(tmp_path / "run")] == [4]
    assert not (tmp_path / "run" / "final_model").exists()
    assert not (tmp_path / "run" / "COMPLETE").exists()
    assert verify_directory(tmp_path / "run" / LAST) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode
        != 0
    ):
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_a_checkpoint_and_says_how_much_is_missing(
    nano: Nano, tmp_path: Path, small_disk: Path, at_step: Callable[..., None], capfd: Said
) -> None:
    run(nano(**QUIET), tmp_path / "whole")
    filler = small_disk / "filler"

    def fill_or_free(head: Head) -> float:
        if filler.exists():
            filler.unlink()
            return 1.0
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        return 1.0

    at_step(fill_or_free, 6, 10)
    run(nano(**QUIET), small_disk / "run")
    said = capfd.readouterr().err
    assert "no checkpoint at step 8" in said
    assert "MB are missing" in said
    assert [record["step"] for record in read_metrics(small_disk / "run").of("checkpoint")] == [4, 12]
    assert curve(small_disk / "run") == curve(tmp_path / "whole")
    assert stored(small_disk / "run" / LAST) == stored(tmp_path / "whole" / LAST)


# A link that cannot be made is replaced by a file: `test_a_run_lives_in_a_folder_without_links`.
CALLS = ["mkdir", "fsync", "rename", "replace"]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=["full", "read-only", "broken"])
def test_a_failing_call_of_a_save_costs_that_checkpoint_only(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Said, name: str, number: int
) -> None:
    plain_save, plain_call = checkpoint.save_checkpoint, getattr(os, name)

    def save(folder: Path, number_of_step: int, *rest: Any, **named: Any) -> Any:
        def fail(*arguments: Any, **options: Any) -> Any:
            raise OSError(number, os.strerror(number))

        if number_of_step != 8:
            return plain_save(folder, number_of_step, *rest, **named)
        monkeypatch.setattr(os, name, fail)
        try:
            return plain_save(folder, number_of_step, *rest, **named)
        finally:
            monkeypatch.setattr(os, name, plain_call)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    assert run(nano(**QUIET), tmp_path / "run").outcome.complete
    said = capfd.readouterr().err
    assert f"no checkpoint at step 8: [Errno {number}]" in said or os.strerror(number) in said
    assert (tmp_path / "run" / LAST).resolve().name == "checkpoint_step_12"
    assert verify_directory(tmp_path / "run" / LAST) == []
    assert list((tmp_path / "run").glob(f"{TEMPORARY}*")) == []
    assert any("checkpoint not written" in record["message"] for record in read_metrics(tmp_path / "run").of("warning"))


def test_a_run_folder_that_cannot_be_written_is_refused_by_name(nano: Nano, tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(InputError, match=r"run\.lock.*Read-only file system"):
        run(nano(**QUIET), small_disk / "run")


def test_metrics_that_the_disk_refuses_are_written_when_it_takes_them(tmp_path: Path, nano: Nano, capfd: Said) -> None:
    log = MetricsLog(tmp_path, nano().log)
    plain = log._file

    class Full:
        def write(self, data: bytes) -> int:
            assert plain is not None
            plain.write(data[:7])
            log._file = broken
            return 7

    class Broken:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    broken: Any = Broken()
    log.write("step", 1, loss=1.0)
    log._file = Full()  # type: ignore[assignment]
    log.write("step", 2, loss=2.0)
    log.write("step", 3, loss=3.0)
    log._file = plain
    log.write("step", 4, loss=4.0)
    log.close()
    assert capfd.readouterr().err.count("No space left") == 1
    assert [record["loss"] for record in read_metrics(tmp_path).of("step")] == [1.0, 2.0, 3.0, 4.0]
    assert read_metrics(tmp_path).problems == ()


def test_a_number_that_json_has_not_is_null_in_the_record(tmp_path: Path, nano: Nano) -> None:
    log = MetricsLog(tmp_path, nano().log)
    log.write("step", 1, loss=math.nan, sources={"web": {"loss": math.inf}}, rates=[1.0, -math.inf])
    log.close()
    found = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (found["loss"], found["sources"], found["rates"]) == (None, {"web": {"loss": None}}, [1.0, None])


def test_half_a_line_left_by_a_kill_is_named_and_costs_nothing_else(nano: Nano, tmp_path: Path) -> None:
    run(nano(**QUIET), tmp_path / "whole")
    run(nano(**QUIET), tmp_path / "run", stop_after_step=6)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "step": 7, "time": 17')
    run(nano(**QUIET), tmp_path / "run")
    found = read_metrics(tmp_path / "run")
    assert len(found.problems) == 1
    assert "cut in the middle" in found.problems[0]
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_an_exception_in_sampling_is_recorded_and_changes_nothing(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(nano(), tmp_path / "whole")

    def fail(*arguments: Any, **options: Any) -> str:
        torch.rand(7)  # whatever it drew before it failed
        raise ValueError("planted")

    monkeypatch.setattr(hooks, "stream_text", fail)
    assert run(nano(), tmp_path / "run").outcome.complete
    messages = [record["message"] for record in read_metrics(tmp_path / "run").of("warning")]
    assert messages == ["sampling failed: ValueError: planted"] * 3
    assert stored(tmp_path / "run" / LAST) == stored(tmp_path / "whole" / LAST)


def test_a_hang_in_sampling_is_given_up_and_changes_nothing(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(nano(), tmp_path / "whole")
    release = threading.Event()
    monkeypatch.setattr(hooks, "stream_text", lambda *arguments, **options: release.wait() and "")
    try:
        assert run(nano(**{"log.telemetry_limit": '"0.1s"'}), tmp_path / "run").outcome.complete
    finally:
        release.set()
    messages = [record["message"] for record in read_metrics(tmp_path / "run").of("warning")]
    assert messages == ["sampling failed: TimeoutError: took longer than 0.1 s and was given up"] * 3
    assert stored(tmp_path / "run" / LAST) == stored(tmp_path / "whole" / LAST)


def test_a_sample_that_cannot_be_written_down_stops_nothing(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "add_sample", full)
    assert run(nano(), tmp_path / "run").outcome.complete


def test_a_clock_set_back_changes_nothing(nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = nano(**QUIET, **{"stop.wall_time": '"1h"', "checkpoint.every_minutes": "30"})
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "run", stop_after_step=6)
    past = itertools.count(1_000_000_000, -60)  # 2001, and a minute earlier at each look
    monkeypatch.setattr(time, "time", lambda: float(next(past)))
    assert run(recipe, tmp_path / "run").outcome.complete
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    saves = [record["step"] for record in read_metrics(tmp_path / "run").of("checkpoint")]
    assert saves == [4, 6, 8, 12]


def test_half_a_lock_is_taken_over_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).write_text('{"host": "a')
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    RunFolder(tmp_path).acquire()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


RACE = """
import os, pathlib, sys
from argonne.errors import InputError
from argonne.train.run import RunFolder
start, done = os.pipe(), os.pipe()
children = []
for number in range(12):
    if (pid := os.fork()) == 0:
        os.close(start[1])
        os.read(start[0], 1)  # all begin when the parent closes its end
        try:
            RunFolder(pathlib.Path(sys.argv[1])).acquire()
            os.write(done[1], b"o")
        except InputError:
            os.write(done[1], b".")
        os.read(0, 1)  # an owner stays alive until everybody has tried
        os._exit(0)
    children.append(pid)
os.close(start[1])
answers = b""
while len(answers) < len(children):
    answers += os.read(done[0], 64)
print(answers.count(b"o"))
"""


def test_of_many_processes_that_find_a_dead_lock_one_gets_the_run(tmp_path: Path) -> None:
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        (folder / LOCK).write_text(
            json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1, "started": "1", "time": 0})
        )
        found = subprocess.run(
            [sys.executable, "-c", RACE, folder], capture_output=True, text=True, input="", check=True
        )
        assert found.stdout == "1\n", found.stderr


def _measured(losses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out losses at steps 3, 6, 9 and 12 of a nano run."""
    left = iter(losses)
    found = {"bits_per_byte": None, "tokens": 1, "bytes": 0}

    def held_out(*arguments: Any) -> Work[dict[str, Any]]:
        yield
        return {"loss": next(left), **found}

    monkeypatch.setattr(hooks, "held_out_loss", held_out)


def _fail_once(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first save of `step` finds no room on the disk."""
    plain, fails = checkpoint.save_checkpoint, [step]

    def save(run: Path, step: int, *rest: Any, **named: Any) -> None:
        if step in fails:
            fails.remove(step)
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(run, step, *rest, **named)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)


BEST = {
    "checkpoint.every_steps": "2",
    "checkpoint.keep_last": "1",
    "checkpoint.keep_best": "true",
    "eval.every_steps": "3",
}


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_new_best_is_saved_when_it_is_found_whatever_the_save_rhythm(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: str
) -> None:
    _measured([2.0, 1.0, 0.5, 3.0], monkeypatch)
    run(nano(**BEST, **{"checkpoint.asynchronous": background}), tmp_path / "run")
    assert [saved.step for saved in checkpoint.list_checkpoints(tmp_path / "run")] == [9, 12]
    progress = checkpoint.read_state(tmp_path / "run" / LAST)["progress"]
    assert (progress["best_step"], progress["best_held_out"]) == (9, 0.5)


def test_a_held_out_loss_that_is_no_number_is_never_the_best(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _measured([math.nan, 1.0, 2.0, 3.0], monkeypatch)
    run(nano(**BEST), tmp_path / "run")
    assert checkpoint.read_state(tmp_path / "run" / LAST)["progress"]["best_step"] == 6


@pytest.mark.parametrize("background", ["false", "true"])
def test_the_best_checkpoint_stays_until_its_successor_is_on_the_disk(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: str
) -> None:
    _measured([2.0, 1.0, 0.5, 3.0], monkeypatch)
    _fail_once(9, monkeypatch)
    run(nano(**BEST, **{"checkpoint.asynchronous": background}), tmp_path / "run")
    assert [saved.step for saved in checkpoint.list_checkpoints(tmp_path / "run")] == [6, 12]
    progress = checkpoint.read_state(tmp_path / "run" / LAST)["progress"]
    assert (progress["best_step"], progress["best_held_out"]) == (6, 1.0)


def test_a_background_save_that_failed_does_not_forbid_the_last_one(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_once(8, monkeypatch)
    outcome = run(nano(**{"checkpoint.asynchronous": "true"}), tmp_path / "run", stop_after_step=8).outcome
    assert outcome.step == 8
    assert [saved.step for saved in checkpoint.list_checkpoints(tmp_path / "run")] == [4, 8]


def test_a_run_that_was_copied_elsewhere_resumes_there(nano: Nano, tmp_path: Path) -> None:
    run(nano(**QUIET), tmp_path / "whole")
    run(nano(**QUIET), tmp_path / "run", stop_after_step=6)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    run(nano(**QUIET), tmp_path / "moved")
    assert stored(tmp_path / "moved" / LAST) == stored(tmp_path / "whole" / LAST)
