"""A victim dies at each operation of a save in turn; the run is always resumable, tidy and bit-identical."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.files import TEMPORARY, verify_directory
from argonne.report.records import read_metrics
from argonne.train.checkpoint import LAST, list_checkpoints
from tests.crash.conftest import Mother
from tests.crash.faults import EXIT_CODE
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
Finish = Callable[..., None]
KINDS = {"open", "write", "fsync", "rename", "unlink", "rmdir", "mkdir", "symlink"}
OFTEN = {"open", "write", "fsync", "rename", "unlink"}  # times enough in a save that each fourth operation meets them


def complete_steps(run: Path) -> list[int]:
    return [saved.step for saved in list_checkpoints(run) if verify_directory(saved.path) == []]


def crash_at_operations(mother: Mother, recipe: Recipe, run: Path, mode: str, stride: int) -> list[str]:
    """One session for each operation of a save, or each of `stride`: it resumes what the last one left, and dies so
    many operations later. Returns the operations.
    """
    report, visited = run.parent / f"{run.name}.operation", []
    for number in range(1, 1000, stride):
        before = complete_steps(run)
        mother.start(recipe, run, crash={"at": number, "mode": mode, "report": str(report)})
        (code,) = mother.wait()
        if code == 0:
            return visited
        assert code == EXIT_CODE, (run.parent / f"{run.name}.log").read_text()[-4000:]
        visited.append(report.read_text().strip())
        after = complete_steps(run)
        assert after, f"nothing to resume after a crash at operation {number}: {visited[-1]}"
        assert after[-1] in (before[-1], before[-1] + 1), f"operation {number}, {visited[-1]}: {before} -> {after}"
        if len(after) > 1:  # the crash came before the pruning was over: the next save makes up for it
            mother.start(recipe, run, stop_after=after[-1] + 1)
            assert mother.wait() == [3]
            assert complete_steps(run) == [after[-1] + 1]
    raise AssertionError("a save never ended")


@pytest.mark.parametrize(
    ("mode", "stride"),
    [
        ("kill", 4),
        pytest.param("kill", 1, marks=pytest.mark.campaign),
        pytest.param("power cut", 1, marks=pytest.mark.campaign),
    ],
)
def test_a_crash_at_any_operation_of_a_save_costs_nothing(
    mother: Mother, finish: Finish, nano: Nano, tmp_path: Path, mode: str, stride: int
) -> None:
    quiet = {"checkpoint.sample_prompt": "", "eval.windows": "0", "checkpoint.keep_last": "1"}
    recipe = nano(**{"train.steps": "80", "checkpoint.every_steps": "1", **quiet})
    finish(recipe, tmp_path / "whole")
    mother.start(recipe, tmp_path / "crashed", stop_after=1)
    assert mother.wait() == [3]
    visited = crash_at_operations(mother, recipe, tmp_path / "crashed", mode, stride)
    print(f"{len(visited)} operations visited")
    kinds = {text.split()[0] for text in visited}
    assert kinds == KINDS if stride == 1 else kinds >= OFTEN
    assert curve(tmp_path / "crashed") == curve(tmp_path / "whole")
    assert stored(tmp_path / "crashed" / LAST) == stored(tmp_path / "whole" / LAST)
    assert list((tmp_path / "crashed").glob(f"{TEMPORARY}*")) == []


@pytest.mark.campaign
@pytest.mark.parametrize("mode", ["kill", "power cut"])
def test_a_crash_at_any_operation_of_the_end_of_a_run_costs_nothing(
    mother: Mother, finish: Finish, nano: Nano, tmp_path: Path, mode: str
) -> None:
    """The final model is complete or absent, and COMPLETE is never there without it."""
    recipe, run = nano(**{"checkpoint.sample_prompt": "", "eval.windows": "0"}), tmp_path / "crashed"
    finish(recipe, tmp_path / "whole")
    report, visited = tmp_path / "operation", []
    for number in range(1, 1000):
        crash = {"at": number, "mode": mode, "report": str(report), "begin": f"{TEMPORARY}final_model"}
        mother.start(recipe, run, crash=crash)
        (code,) = mother.wait()
        if (run / "COMPLETE").exists() or (run / "final_model").exists():
            assert verify_directory(run / "final_model") == [], f"operation {number}"
        if code == 0:
            break
        assert code == EXIT_CODE, (tmp_path / "crashed.log").read_text()[-4000:]
        visited.append(report.read_text().strip())
    print(f"{len(visited)} operations visited")
    assert any("COMPLETE" in text for text in visited)
    assert curve(run) == curve(tmp_path / "whole")
    assert stored(run / "final_model") == stored(tmp_path / "whole" / "final_model")
    if mode == "kill":  # a power cut may take the last records of telemetry; the marker is what counts
        assert [record["step"] for record in read_metrics(run).of("complete")] == [12]
    finish(recipe, run)
