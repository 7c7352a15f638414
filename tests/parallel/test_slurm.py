"""Chains of jobs on a real SLURM of one node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.cli import main
from argonne.config import Recipe
from argonne.files import TEMPORARY
from argonne.layout import LAST
from argonne.plan.shape import as_trained
from argonne.recipe import to_toml
from argonne.report.records import read_metrics
from tests.train.helpers import curve, stored
from tests.tuning import conversations, pairs, write

Nano = Callable[..., Recipe]
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3000), pytest.mark.usefixtures("slurm")]
QUIET = {"checkpoint.sample_prompt": "", "eval.windows": "0", "eval.every_steps": "0", "log.every_steps": "1"}
CHAT = """base = "nano-3.0-{stage}"

[data]
sources = [{{ path = "{stage}.jsonl", max_epochs = 9.0 }}]
sequence_length = 128

[batch]
tokens_per_step = 512

[train]
epochs = "unset"
steps = 6

[schedule]
warmup = 1

[checkpoint]
sample_prompt = ""

[eval]
windows = 0
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, value in (("PYTHONPATH", str(ROOT)), ("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    return tmp_path


def save(recipe: Recipe, name: str) -> str:
    Path(name).write_text(to_toml(as_trained(recipe)))
    return name


def queue() -> list[str]:
    said = subprocess.run(["squeue", "-h", "-o", "%i %T"], capture_output=True, text=True, check=True).stdout
    return said.split("\n")[:-1]


def wait_until(true: Callable[[], object], seconds: float = 1500, every: float = 1.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, (
            queue(),
            [path.read_text()[-2000:] for path in Path().glob("runs/*/launch/*.log")],
        )
        time.sleep(every)


def logs(run: str) -> list[Path]:
    return sorted(Path("runs", run, "launch").glob("*.log"), key=lambda path: int(path.stem))


def test_a_chain_of_jobs_of_two_minutes_is_the_uninterrupted_run_and_the_stages_after_it_follow(
    nano: Nano, tokens: Path
) -> None:
    """Pretraining takes at least three jobs; SFT and DPO go on from it; what is left of the chain is taken back."""
    longer = {"batch.tokens_per_step": "4096", "batch.micro": "128", "checkpoint.every_steps": "500"}
    longer |= {"model.max_position_embeddings": "128"}
    longer |= {"data.sources": f"[{{ path = {json.dumps(str(tokens))}, max_epochs = 99 }}]"}
    probe = save(nano(**QUIET, **longer, **{"train.steps": "60"}), "probe.toml")
    assert main(["pretrain", probe, "--run", "probe"]) == 0
    speed = read_metrics(Path("probe")).of("step")[-1]["tokens_per_second"] / 4096
    # A job of two minutes trains for 75 s at most: however fast the machine is, three are needed.
    first = save(nano(**QUIET, **longer, **{"train.steps": str(int(200 * speed))}), "first.toml")
    write(Path("sft.jsonl"), conversations(60))
    write(Path("dpo.jsonl"), pairs(60))
    for stage in ("sft", "dpo"):
        Path(f"{stage}.toml").write_text(CHAT.format(stage=stage))
    chain = [first, "sft.toml", "dpo.toml"]
    assert main(["launch", "slurm", *chain, "--time", "2m", "--stop-before", "45s", "--partition", "test"]) == 0
    wait_until(lambda: not queue())
    runs = [Path("runs", name) for name in ("first", "sft", "dpo")]
    assert all((run / "COMPLETE").exists() for run in runs), logs("first")[-1].read_text()
    assert json.loads((runs[0] / "manifest.json").read_text())["sessions"] >= 3
    assert "every run is complete" in logs("first")[-1].read_text()
    parents = [json.loads((run / "manifest.json").read_text())["parent"]["model"] for run in runs[1:]]
    assert parents == ["runs/first", "runs/sft"]
    assert main(["pretrain", first, "--run", "whole/first"]) == 0
    assert main(["sft", "sft.toml", "--run", "whole/sft", "--init-from", "whole/first"]) == 0
    assert main(["dpo", "dpo.toml", "--run", "whole/dpo", "--init-from", "whole/sft"]) == 0
    for run in runs:
        assert curve(run) == curve(Path("whole", run.name))
        assert stored(run / LAST) == stored(Path("whole", run.name, LAST))
        assert stored(run / "final_model") == stored(Path("whole", run.name, "final_model"))


def test_a_job_that_always_fails_ends_the_chain(nano: Nano) -> None:
    first = save(nano(), "first.toml")
    assert main(["launch", "slurm", first, "--time", "2m", "--stop-before", "30s", "--max-failures", "2"]) == 0
    Path(first).unlink()
    wait_until(lambda: not queue())
    assert len(logs("first")) == 2
    assert "2 jobs in a row brought runs/first no further: the chain ends" in logs("first")[-1].read_text()


@pytest.mark.parametrize("how", [[], ["--signal=KILL", "--full"]], ids=["scancel", "kill"])
def test_a_job_that_is_cancelled_in_the_middle_of_a_save_loses_nothing(nano: Nano, how: list[str]) -> None:
    steps = {"train.steps": "300", "checkpoint.every_steps": "5"}
    first = save(nano(**QUIET, **steps, **{"checkpoint.keep_last": "100"}), "first.toml")
    assert main(["launch", "slurm", first, "--time", "10m"]) == 0
    run = Path("runs/first")
    wait_until(lambda: (run / LAST).exists() and any(run.glob(f"{TEMPORARY}checkpoint*")), every=0.001)
    subprocess.run(["scancel", *how, (run / "launch/started").read_text().strip()], check=True)
    wait_until(lambda: not queue())
    assert (run / "COMPLETE").exists(), logs("first")[-1].read_text()
    assert len(logs("first")) == 2
    assert main(["pretrain", first, "--run", "whole"]) == 0
    assert curve(run) == curve(Path("whole"))
    assert stored(run / LAST) == stored(Path("whole", LAST))


def test_tasks_of_srun_join_as_the_workers_of_one_run(nano: Nano) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores")
    first = save(nano(**QUIET), "first.toml")
    srun = ["srun", "--nodes=1", "--ntasks=2", "--overcommit", "--immediate=300"]  # rather fails than waits
    command = [*srun, sys.executable, "-m", "argonne", "pretrain", first, "--run", "joined"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("joined/manifest.json").read_text())["world_size"] == 2
    assert main(["pretrain", first, "--run", "alone"]) == 0
    found, expected = curve(Path("joined")), curve(Path("alone"))
    assert [record["tokens"] for record in found] == [record["tokens"] for record in expected]
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=1e-5)
