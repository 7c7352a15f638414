"""Settings of jobs as the directives of SLURM and PBS."""

from __future__ import annotations

import pytest

from argonne.cli import main
from argonne.errors import InputError
from argonne.jobs import JobSettings, directives

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
