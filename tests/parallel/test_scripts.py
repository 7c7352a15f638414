"""`argonne launch`: what is refused before anything is handed in, what a script says, how a chain goes on and ends."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.cli import main
from argonne.config import Recipe
from argonne.layout import LAST
from argonne.plan.shape import as_trained
from argonne.recipe import to_toml
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from tests.parallel.pbs import Pbs, with_commands
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]


@pytest.fixture
def pbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pbs:
    found = Pbs(tmp_path / "pbs")
    monkeypatch.setenv("PATH", with_commands(found))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def first(nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe that pretrains, in a folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first.toml").write_text(to_toml(as_trained(nano(**{"checkpoint.sample_prompt": ""}))))
    return "first.toml"


@pytest.fixture
def tuned(chat: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe that fine-tunes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned.toml").write_text(to_toml(as_trained(chat(**{"checkpoint.sample_prompt": ""}))))
    return "tuned.toml"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lsf", "first.toml"], "found 'lsf', expected one of 'slurm', 'pbs'"),
        (["slurm"], "RECIPE"),
        (["slurm", "none.toml"], "none.toml: recipe none.toml: no such file"),
        (["slurm", "first.toml", "--optim.lrr", "1"], "first.toml: unknown recipe key 'optim.lrr'; did you mean"),
        (["slurm", "first.toml", "--data.sources", "gone"], "first.toml: token set gone: no such file or folder"),
        (["slurm", "first.toml", "first.toml"], "for 2 recipes, expected one for each"),
        (["slurm", "first.toml", "--run", "a", "b"], "--run: found a, b for 1 recipes, expected one for each"),
        (["slurm", "nano-3.0-sft"], "nano-3.0-sft: model.init_from: runs/nano-3.0 has no weights; train it first"),
        (["slurm", "first.toml", "--", "--rewind", "4"], "--rewind: is not for each job of a chain; run the verb once"),
        (["slurm", "first.toml", "--", "--run", "x"], "--run: is not for each job of a chain; give it before the --"),
        (["slurm", "first.toml", "--nodes", "0"], "--nodes: found 0, expected at least 1"),
        (["slurm", "first.toml", "--time", "soon"], "--time: found 'soon', expected seconds, or 90m"),
        (
            ["slurm", "first.toml", "--time", "5m"],
            "--stop-before: found '5m', expected at least a second and less than",
        ),
        (["slurm", "first.toml", "--max-failures", "0"], "--max-failures: found 0, expected at least 1"),
        (["pbs", "first.toml"], "--time: not set, and PBS gives no notice before a job's limit"),
        (["pbs", "first.toml", "--time", "1h", "--nodes", "2"], "--nodes: found 2, expected 1 with PBS"),
        (["pbs", "first.toml", "--time", "1h", "--exclude", "a"], "--exclude: PBS has no such setting"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_is_one_line_and_exit_code_2_before_anything_is_handed_in(
    arguments: list[str], said: str, first: str, pbs: Pbs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("argonne: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert not Path("runs").exists()
    assert not list(pbs.folder.glob("job-*"))


def test_a_scheduler_that_is_not_here_is_named(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "slurm", first]) == 2
    assert "launch slurm: there is no sbatch here" in capsys.readouterr().err


def script(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["launch", "--dry-run", *arguments]) == 0
    found = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=found, text=True, check=False).returncode == 0
    return found


def commands(text: str) -> list[str]:
    return [line.partition(" -m argonne ")[2] for line in text.splitlines() if line.startswith("train ")]


def test_a_dry_run_shows_the_script_and_writes_nothing(first: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = script(capsys, "slurm", first, "--time", "2h", "--gpus", "4", "--cpus", "16", "--exclude", "n1", "n2")
    for line in (
        "#SBATCH --no-requeue --signal=B:USR1@300",
        "#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=16",
        "#SBATCH --time=02:00:00",
        "#SBATCH --exclude=n1,n2",
        f"--job-name=argonne-first --output={Path.cwd()}/runs/first/launch/%j.log",
    ):
        assert line in said
    assert commands(said) == ["pretrain first.toml --run runs/first"]
    assert "torchrun" not in said
    assert not Path("runs").exists()


def test_each_recipe_starts_from_the_formers_run_unless_it_says_itself_from_what(
    first: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = json.dumps(str(tmp_path / "chat.jsonl"))
    (tmp_path / "chat.jsonl").write_text('{"messages": []}\n')
    of_packaged = f'base = "nano-3.0-sft"\ndata.sources = [{{ path = {source} }}]\n'
    (tmp_path / "sft.toml").write_text(of_packaged)
    (tmp_path / "own.toml").write_text(f"{of_packaged}model.init_from = {json.dumps(str(base))}\n")
    (tmp_path / "again.toml").write_text('base = "first.toml"\nseed = 2\n')
    said = script(capsys, "slurm", first, "sft.toml", "own.toml", "again.toml", "--checkpoint.keep_last", "3")
    assert commands(said) == [
        "pretrain first.toml --run runs/first --checkpoint.keep_last 3",
        "sft sft.toml --run runs/sft --init-from runs/first --checkpoint.keep_last 3",
        "sft own.toml --run runs/own --checkpoint.keep_last 3",
        "pretrain again.toml --run runs/again --checkpoint.keep_last 3",
    ]


def test_flags_of_a_training_verb_and_names_with_blanks_reach_the_command(
    first: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--run", "my runs/a", "--init-from", str(base), "--train.steps", "9", "--", "--allow", "optim.lr"]
    (found,) = commands(script(capsys, "slurm", first, *arguments))
    assert found == f"continue first.toml --run 'my runs/a' --init-from {base} --train.steps 9 --allow optim.lr"


def test_several_nodes_start_one_command_each_by_srun(first: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = script(capsys, "slurm", first, "--nodes", "2", "--cpus", "8")
    assert re.search(r"^train runs/first srun --kill-on-bad-exit=0 --cpus-per-task=8 \S+ -m argonne pre", said, re.M)


def test_pbs_is_given_a_deadline(first: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = script(capsys, "pbs", first, "--time", "2h", "--gpus", "4", "--cpus", "16", "--mem", "64gb")
    for line in (
        "#PBS -l select=1:ncpus=16:ngpus=4:mem=64gb",
        "#PBS -l walltime=02:00:00",
        "deadline=$(($(date +%s) + 6900))",
    ):
        assert line in said
    assert commands(said) == ['pretrain first.toml --run runs/first --deadline "$deadline"']


def test_a_fine_tuning_run_by_jobs_of_pbs_is_the_uninterrupted_one(
    tuned: str, chat: Nano, pbs: Pbs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(chat(**{"checkpoint.sample_prompt": ""}), tmp_path / "whole")
    settings = (
        "--time",
        "10m",
        "--partition",
        "gpu",
        "--account",
        "lab",
        "--cpus",
        "1",
        "--parallel.max_restarts",
        "2",
    )
    assert main(["launch", "pbs", tuned, *settings]) == 0
    assert capsys.readouterr().out == "1.server\n"
    assert pbs.run_all() == [0]
    state = tmp_path / "runs/tuned/launch"
    assert "every run is complete" in (state / "1.server.log").read_text()
    assert stored(tmp_path / "runs/tuned" / LAST) == stored(tmp_path / "whole" / LAST)
    assert len(list(pbs.folder.glob("job-*"))) == 2  # the second was taken back
    assert main(["launch", "pbs", tuned, *settings]) == 0
    assert "every run is complete; nothing to do" in capsys.readouterr().err


def test_a_chain_that_brings_a_run_no_further_ends_after_so_many_jobs(
    first: str, pbs: Pbs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "pbs", first, "--time", "10m", "--max-failures", "2"]) == 0
    Path(first).rename("gone.toml")
    assert pbs.run_all() == [1, 1]
    state = Path("runs/first/launch")
    assert "2 jobs in a row brought runs/first no further: the chain ends" in (state / "2.server.log").read_text()
    assert not list(pbs.folder.glob("queued-*"))
    Path("gone.toml").rename(first)
    assert main(["launch", "pbs", first, "--time", "10m", "--max-failures", "2"]) == 0
    assert pbs.run_all() == [0]
    assert Path("runs/first/COMPLETE").exists()


def test_jobs_that_are_killed_are_counted_by_the_ones_after_them(first: str, pbs: Pbs) -> None:
    """A job that dies with its script counts nothing itself."""
    assert main(["launch", "pbs", first, "--time", "10m", "--max-failures", "2"]) == 0
    job = Path("runs/first/launch/job.sh")
    job.write_text(job.read_text().replace("\ntrain runs/first", "\nkill -9 $$\ntrain runs/first"))
    (pbs.folder / "job-1.server").write_text(job.read_text())
    assert len(codes := pbs.run_all()) == 3
    assert codes[-1] == 1
    assert "2 jobs in a row brought the run no further" in Path("runs/first/launch/3.server.log").read_text()


def test_a_chain_that_is_still_there_is_not_begun_twice(
    first: str, pbs: Pbs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "pbs", first, "--time", "10m"]) == 0
    assert main(["launch", "pbs", first, "--time", "10m"]) == 2
    assert "job 1.server of this chain is still there" in capsys.readouterr().err


def test_a_chain_of_which_the_scheduler_says_nothing_is_not_begun_twice(
    first: str, pbs: Pbs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "pbs", first, "--time", "10m"]) == 0
    (pbs.commands / "qstat").write_text("#!/bin/sh\necho cannot connect to server >&2\nexit 1\n")
    assert main(["launch", "pbs", first, "--time", "10m"]) == 2
    assert "qstat does not say whether it is still there (cannot connect to server)" in capsys.readouterr().err
    assert len(list(pbs.folder.glob("job-*"))) == 1


@pytest.mark.parametrize(
    ("scheduler", "command", "text", "gone"),
    [
        ("pbs", "qstat", "exit 153", True),
        ("pbs", "qstat", "exit 35", True),
        ("pbs", "qstat", "exit 0", False),
        ("pbs", "qstat", "exit 1", False),
        ("slurm", "squeue", "echo 8", True),
        ("slurm", "squeue", "echo 8; echo 7", False),
        ("slurm", "squeue", "exit 1", False),
    ],
)
def test_a_job_takes_the_run_over_only_from_one_that_is_gone_for_certain(
    scheduler: str, command: str, text: str, gone: bool, first: str, pbs: Pbs, capsys: pytest.CaptureFixture[str]
) -> None:
    (pbs.commands / command).write_text(f"#!/bin/sh\n{text}\n")
    (pbs.commands / command).chmod(0o755)
    assert main(["launch", scheduler, first, "--time", "10m", "--dry-run"]) == 0
    asked = re.search(r"^gone\(\) .*$", capsys.readouterr().out, re.MULTILINE)
    assert asked is not None
    done = subprocess.run(["bash", "-c", f"{asked[0]}\ngone 7"], check=False)
    assert (done.returncode == 0) is gone


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_a_run_longer_than_a_job_of_pbs_is_the_uninterrupted_one(
    nano: Nano, tokens: Path, pbs: Pbs, tmp_path: Path
) -> None:
    """The deadline, 20 s before the limit of a minute, stops and saves; the next job goes on."""
    keys = {"checkpoint.sample_prompt": "", "eval.windows": "0", "eval.every_steps": "0", "batch.micro": "64"}
    keys |= {"batch.tokens_per_step": "2048", "checkpoint.every_steps": "0"}
    keys |= {"data.sources": f"[{{ path = {json.dumps(str(tokens))}, max_epochs = 99 }}]"}

    def save(name: str, steps: int) -> str:
        (tmp_path / name).write_text(to_toml(as_trained(nano(**keys, **{"train.steps": str(steps)}))))
        return name

    assert main(["pretrain", save("probe.toml", 40), "--run", "probe"]) == 0
    speed = read_metrics(tmp_path / "probe").of("step")[-1]["tokens_per_second"] / 2048
    first = save("first.toml", int(80 * speed))  # a job trains for 40 s at most: however fast the machine is, two
    assert main(["launch", "pbs", first, "--time", "1m", "--stop-before", "20s"]) == 0
    assert len(pbs.run_all()) >= 2
    assert main(["pretrain", first, "--run", "whole"]) == 0
    assert curve(tmp_path / "runs/first") == curve(tmp_path / "whole")
    assert stored(tmp_path / "runs/first" / LAST) == stored(tmp_path / "whole" / LAST)
