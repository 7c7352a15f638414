"""Settings of jobs as the directives of SLURM and PBS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.cli import main
from argonne.errors import InputError, NoAnswer
from argonne.jobs import JobSettings, directives, is_queued, submit

SETTINGS = JobSettings("gpu", "lab", None, "1-12:00:00", "64G", (), ("--constraint=a100",))


def test_settings_are_written_as_slurm_reads_them() -> None:
    given = JobSettings("gpu", "lab", "high", "90m", "64G", ("node07", "node[03-05]"), ("--constraint=a100",))
    assert directives("slurm", given) == [
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --qos=high",
        "#SBATCH --mem=64G",
        "#SBATCH --time=01:30:00",
        "#SBATCH --exclude=node07,node[03-05]",
        "#SBATCH --constraint=a100",
    ]


def test_settings_are_written_as_pbs_reads_them() -> None:
    given = JobSettings(partition="gpu", account="lab", time="1-12:00:00", directive=("-l place=excl",))
    assert directives("pbs", given) == [
        "#PBS -q gpu",
        "#PBS -A lab",
        "#PBS -l walltime=36:00:00",
        "#PBS -l place=excl",
    ]


def test_what_is_not_given_is_left_to_the_scheduler() -> None:
    assert directives("slurm", JobSettings()) == directives("pbs", JobSettings()) == []


@pytest.mark.parametrize(
    ("scheduler", "settings", "message"),
    [
        ("pbs", JobSettings(exclude=("node07",)), "--exclude: PBS has no such setting"),
        ("pbs", JobSettings(qos="high"), "--qos: PBS has no such setting"),
        ("slurm", JobSettings(time="12:30"), "--time: found '12:30', expected hours or minutes"),
        ("slurm", JobSettings(time="5s"), "--time: found '5s', 5 seconds, expected at least a minute"),
        ("slurm", JobSettings(partition="a b"), "--partition: found 'a b', expected one word"),
        ("slurm", JobSettings(directive=("--comment=x\nrm",)), "expected one word"),
    ],
)
def test_a_setting_that_no_scheduler_would_take_is_refused(scheduler: str, settings: JobSettings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        directives(scheduler, settings)


def test_settings_of_slurm_without_its_engine_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--input", "a.txt", "--tokenizer", "t", "--out", "o", "--partition", "gpu"]) == 2
    assert "--partition: found 'gpu', but it acts only with --engine slurm" in capsys.readouterr().err


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts stand-ins for a scheduler's commands on the path, each a shell script's text."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def put(**texts: str) -> None:
        for name, text in texts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)

    return put


BUSY = "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1"
# As squeue does for a job that has left the controller's memory: the same exit code, but a list of all jobs is given.
PURGED = 'case "$*" in *-j*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;; *) echo 8;; esac'


@pytest.mark.parametrize(
    ("squeue", "sacct", "expected"),
    [
        ("echo RUNNING", "exit 1", True),
        ("exit 0", "exit 1", False),
        (BUSY, "printf 'COMPLETED\\nRUNNING\\n'", True),
        (BUSY, "printf 'COMPLETED\\nCANCELLED by 1000\\n'", False),
        (PURGED, "exit 1", False),
        (PURGED, "", False),
        ('case "$*" in *-j*) exit 1;; *) echo 7;; esac', "exit 1", True),
        (BUSY, "exit 1", None),
        (BUSY, "", None),
        (None, None, None),
    ],
)
def test_only_an_answer_of_slurm_says_that_a_job_is_over(
    squeue: str | None, sacct: str | None, expected: bool | None, commands: Callable[..., None]
) -> None:
    commands(**{name: text for name, text in (("squeue", squeue), ("sacct", sacct)) if text is not None})
    if expected is None:
        with pytest.raises(NoAnswer, match="job 7: SLURM does not say whether it is still there"):
            is_queued("slurm", "7")
    else:
        assert is_queued("slurm", "7") is expected


@pytest.mark.parametrize(("code", "expected"), [(0, True), (153, False), (35, False), (1, None), (255, None)])
def test_only_an_answer_of_pbs_says_that_a_job_is_over(
    code: int, expected: bool | None, commands: Callable[..., None]
) -> None:
    commands(qstat=f"echo cannot connect >&2; exit {code}")
    if expected is None:
        with pytest.raises(NoAnswer, match=r"qstat does not say whether it is still there \(cannot connect\)"):
            is_queued("pbs", "7.server")
    else:
        assert is_queued("pbs", "7.server") is expected


def test_a_scheduler_that_names_no_job_is_refused(commands: Callable[..., None], tmp_path: Path) -> None:
    commands(sbatch="exit 0")
    with pytest.raises(InputError, match="named no job"):
        submit("slurm", tmp_path / "job.sh", "launch slurm", "-")
