"""All shared text with the Qwen3 tokenizer: whoever does the work, with whichever encoder and however often it is
killed, the bytes are the same.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from argonne.jobs import JobSettings
from argonne.prepare import encode, engines
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from tests.prepare.helpers import QUIET, content
from tests.prepare.test_engines import ray_for_workers

__all__ = ["ray_for_workers"]
pytestmark = pytest.mark.campaign
NAMES = ("*.parquet", "*.jsonl", "tinyshakespeare.txt", "wiki_demo.txt")


@pytest.fixture(scope="module")
def patterns() -> tuple[str, ...]:
    folder = Path(__file__).resolve().parents[3] / "shared/data/pretrain"
    if not folder.is_dir():
        pytest.skip("../shared/data/pretrain is missing")
    return tuple(str(folder / name) for name in NAMES)


@pytest.fixture(scope="module")
def qwen3(patterns: tuple[str, ...]) -> Path:
    return Path(patterns[0]).parents[2] / "tokenizers/qwen3"


@pytest.fixture(scope="module")
def expected(patterns: tuple[str, ...], qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every file of the set that one process writes with the reference encoder."""
    out = tmp_path_factory.mktemp("whole") / "expected"
    return content(prepare(PrepareOptions(patterns, out, qwen3, workers=1, hold_out=0.02, encoder="tokenizers"), QUIET))


def options(patterns: tuple[str, ...], qwen3: Path, tmp_path: Path, **more: object) -> PrepareOptions:
    return PrepareOptions(patterns, tmp_path / "out", qwen3, hold_out=0.02, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("encoder", ["tokenizers", "gigatoken"])
def test_one_and_two_workers_with_either_encoder_write_the_same_bytes(
    patterns: tuple[str, ...], qwen3: Path, tmp_path: Path, expected: dict[str, str], encoder: str, workers: int
) -> None:
    if encoder == "gigatoken":
        pytest.importorskip("gigatoken", reason="gigatoken is an extra: pip install 'argonne[fast]'")
    assert content(prepare(options(patterns, qwen3, tmp_path, workers=workers, encoder=encoder), QUIET)) == expected


def test_rows_are_documents_and_counted_drops(patterns: tuple[str, ...], qwen3: Path, tmp_path: Path) -> None:
    out = prepare(options(patterns, qwen3, tmp_path, dedup=True, filter=("quality",)), QUIET)
    manifest = json.loads((out / "manifest.json").read_text())
    for totals in (manifest, *manifest["sources"]):
        assert totals["rows"] == totals["documents"] + totals["held_out_documents"] + sum(totals["drops"].values())
    assert manifest["rows"] == sum(source["rows"] for source in manifest["sources"])


def test_three_parts_in_any_order_write_the_same_bytes(
    patterns: tuple[str, ...], qwen3: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    for part in (3, 1, 2):
        prepare(options(patterns, qwen3, tmp_path, part=(part, 3)), QUIET)
    assert content(tmp_path / "out") == expected


@pytest.mark.usefixtures("ray_for_workers")
def test_two_ray_workers_write_the_same_bytes(
    patterns: tuple[str, ...], qwen3: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    assert content(prepare(options(patterns, qwen3, tmp_path, engine="ray", workers=2), QUIET)) == expected


@pytest.mark.usefixtures("slurm")
def test_a_slurm_array_of_two_with_one_killed_in_the_middle_writes_the_same_bytes(
    patterns: tuple[str, ...], qwen3: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, submitted = engines._submit, list[str]()

    def submit_and_kill(job: encode.Job, folder: Path, tasks: int, settings: JobSettings) -> str:
        submitted.append(submit(job, folder, tasks, settings))
        if len(submitted) == 1:
            deadline = time.monotonic() + 120
            while len(list((Path(job.out) / "units").glob("*.json"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            subprocess.run(["scancel", "--signal=KILL", "--full", f"{submitted[0]}_1"], check=True)
        return submitted[-1]

    monkeypatch.setattr(engines, "_submit", submit_and_kill)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    assert (
        content(prepare(options(patterns, qwen3, tmp_path, engine="slurm", workers=2, encoder="tokenizers"), QUIET))
        == expected
    )
    assert len(submitted) == 2


@pytest.mark.parametrize("encoder", ["tokenizers", "gigatoken"])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(
    patterns: tuple[str, ...], qwen3: Path, tmp_path: Path, expected: dict[str, str], encoder: str
) -> None:
    inputs = [argument for pattern in patterns for argument in ("--input", pattern)]
    command = [
        sys.executable,
        "-m",
        "argonne",
        "prepare",
        *inputs,
        "--tokenizer",
        str(qwen3),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--hold-out", "0.02", "--workers", "2", "--encoder", encoder]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    generator, killed, finished = random.Random(encoder), 0, False
    while killed < 12 and not finished:
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        try:
            finished = process.wait(timeout=generator.uniform(0.5, 3.5)) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    assert killed >= 3
    assert content(tmp_path / "out") == expected
