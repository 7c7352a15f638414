"""SLURM, Ray, pools and killed processes: whoever does the work and however often it dies, the bytes are the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from argonne import files, jobs, layout
from argonne.cli import main
from argonne.errors import InputError
from argonne.jobs import JobSettings
from argonne.prepare import encode, engines
from argonne.prepare.options import PrepareOptions
from argonne.prepare.planning import open_plan
from argonne.prepare.prepare import prepare
from argonne.tokens.inspection import inspect_tokens
from tests.prepare.helpers import QUIET, arguments, content, documents_of
from tests.tokensets import words

UNITS = 12


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(UNITS):
        rows = [{"text": words(60, 100 * number + row)} for row in range(40)]
        (folder / f"part_{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "*.jsonl")


@pytest.fixture
def expected(corpus: str, tokenizer_folder: Path, tmp_path: Path) -> dict[str, str]:
    return content(
        prepare(PrepareOptions((corpus,), tmp_path / "expected", tokenizer_folder, workers=1, hold_out=0.1), QUIET)
    )


def test_an_unknown_engine_and_a_missing_sbatch_are_named(
    corpus: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no sbatch here"):
        prepare(PrepareOptions((corpus,), tmp_path / "out", tokenizer_folder, engine="slurm"), QUIET)


def test_slurm_is_asked_again_for_what_a_killed_task_left_undone(
    corpus: str, tokenizer_folder: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[int] = []

    def submit(job: encode.Job, folder: Path, tasks: int, settings: JobSettings) -> str:
        submitted.append(tasks)
        engines.array_task(job.out, job.encoder, job.shard_tokens, 0, tasks)
        if len(submitted) > 1:
            engines.array_task(job.out, job.encoder, job.shard_tokens, 1, tasks)
        return "1"

    monkeypatch.setattr(engines, "_submit", submit)
    monkeypatch.setattr(jobs, "is_queued", lambda scheduler, identifier: False)
    options = PrepareOptions((corpus,), tmp_path / "out", tokenizer_folder, engine="slurm", workers=2, hold_out=0.1)
    assert content(prepare(options, QUIET)) == expected
    assert submitted == [2, 2]


class Deadly(encode.Job):
    """Work whose unit 2 kills the process that begins it, `times` times."""

    times = 1

    def run(self, number: int) -> dict[str, Any]:
        deaths = Path(self.out) / "deaths"
        count = len(deaths.read_text()) if deaths.exists() else 0
        if number == 2 and count < self.times:
            deaths.write_text("x" * (count + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(number)


class AlwaysDeadly(Deadly):
    times = 100


def units_of(job: encode.Job) -> list[int]:
    return list(range(len(files.read_json(Path(job.out) / layout.UNITS_PLAN)["units"])))


@pytest.fixture
def planned(corpus: str, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """The folder of a set that is planned, and nothing of it encoded."""
    open_plan(PrepareOptions((corpus,), tmp_path / "out", tokenizer_folder, hold_out=0.1), tmp_path / "out")
    return tmp_path / "out"


def test_a_killed_worker_is_replaced_and_its_unit_encoded_by_another(planned: Path, expected: dict[str, str]) -> None:
    job = Deadly(str(planned))
    records = dict(engines.local(job, units_of(job), 2))
    assert sorted(records) == units_of(job)
    assert [number for number, record in records.items() if record["warnings"] == [engines.KILLED_ONCE]] == [2]
    found = content(planned)
    assert {name: found[name] for name in expected if name.endswith((".bin", ".idx"))} == {
        name: digest for name, digest in expected.items() if name.endswith((".bin", ".idx"))
    }


def test_workers_that_are_killed_while_they_wait_are_replaced(planned: Path) -> None:
    job = encode.Job(str(planned))
    found = []
    for number, _ in engines.local(job, units_of(job), 2):
        found.append(number)
        if len(found) < 3:
            for child in multiprocessing.active_children():
                child.kill()
                child.join()
    assert sorted(found) == units_of(job)


def test_a_unit_that_kills_every_worker_is_named_with_its_file(planned: Path) -> None:
    job = AlwaysDeadly(str(planned))
    with pytest.raises(InputError, match=r"unit 2 \(.*part_2.jsonl\): 3 worker processes were killed .* Give fewer"):
        list(engines.local(job, units_of(job), 2))


SBATCH = """#!/bin/sh
echo sbatch >> @/calls
for script; do :; done
cp "$script" @/array.sh
echo 7
"""
# Of a controller that is too busy to answer: at the third question both tasks of the array have run.
BUSY = """#!/bin/sh
echo asked >> @/calls
if [ "$(grep -c asked @/calls)" = 3 ]; then
  for task in 0 1; do SLURM_ARRAY_TASK_ID=$task sh @/array.sh >/dev/null 2>&1; done
fi
exit 1
"""
SETTINGS = ["--partition", "cpu", "--account", "lab", "--time", "2h", "--mem", "8G"]


@pytest.fixture
def busy_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for a SLURM whose controller answers nothing; what was called is in `calls`."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", BUSY), ("sacct", "#!/bin/sh\nexit 1\n")):
        (folder / name).write_text(text.replace("@", str(folder)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.setattr(engines, "POLL_SECONDS", 0.0)
    return folder


def test_while_slurm_does_not_answer_the_array_is_waited_for_and_none_is_handed_in_again(
    busy_slurm: Path, corpus: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(corpus, tokenizer_folder, tmp_path / "out", "--engine", "slurm", "--workers", "2", *SETTINGS)
    assert main(command) == 0
    assert (busy_slurm / "calls").read_text().split().count("sbatch") == 1
    assert "warning: job 7: SLURM does not say whether it is still there" in capsys.readouterr().err
    script = (busy_slurm / "array.sh").read_text()
    wanted = ["--partition=cpu", "--account=lab", "--mem=8G", "--time=02:00:00"]
    assert [text for text in wanted if f"#SBATCH {text}\n" not in script] == []


def test_a_slurm_that_never_answers_is_told_and_the_next_command_waits_for_the_same_array(
    busy_slurm: Path, corpus: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "UNANSWERED", 0)
    options = PrepareOptions((corpus,), tmp_path / "out", tokenizer_folder, engine="slurm", workers=2)
    with pytest.raises(InputError, match=r"job 7: SLURM does not say .* run the same command later"):
        prepare(options, QUIET)
    monkeypatch.setattr(engines, "UNANSWERED", 9)
    prepare(options, QUIET)
    assert (busy_slurm / "calls").read_text().split().count("sbatch") == 1


COMMAND = """
import sys
from pathlib import Path
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
if __name__ == "__main__":
    text, out, tokenizer, workers = sys.argv[1:5]
    prepare(PrepareOptions((text,), Path(out), Path(tokenizer), workers=int(workers), hold_out=0.1))
"""


def killed_until_done(tmp_path: Path, corpus: str, tokenizer_folder: Path, workers: int, kills: int, seed: int) -> None:
    """Start `prepare` again and again, and kill its process group after a random time, until it has been killed `kills`
    times; then let it finish.
    """
    script = tmp_path / "run.py"
    script.write_text(COMMAND)
    generator = random.Random(seed)
    command = [sys.executable, str(script), corpus, str(tmp_path / "out"), str(tokenizer_folder), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    for _ in range(kills):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, env=environment)
        try:
            process.wait(timeout=generator.uniform(0.4, 4.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=environment)


def test_killed_at_random_moments_it_ends_in_the_same_bytes(
    corpus: str, tokenizer_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    killed_until_done(tmp_path, corpus, tokenizer_folder, workers=1, kills=3, seed=1)
    assert content(tmp_path / "out") == expected


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(5))
def test_two_workers_killed_at_many_moments_end_in_the_same_bytes(
    corpus: str, tokenizer_folder: Path, tmp_path: Path, expected: dict[str, str], seed: int
) -> None:
    killed_until_done(tmp_path, corpus, tokenizer_folder, workers=2, kills=6, seed=seed)
    assert content(tmp_path / "out") == expected


@pytest.fixture
def ray_for_workers() -> Iterator[None]:
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'argonne[ray]'")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path.cwd())
    yield
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


@pytest.mark.campaign
@pytest.mark.usefixtures("ray_for_workers")
def test_two_ray_workers_write_the_same_bytes(
    corpus: str, tokenizer_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    options = PrepareOptions((corpus,), tmp_path / "out", tokenizer_folder, engine="ray", workers=2, hold_out=0.1)
    assert content(prepare(options, QUIET)) == expected


@pytest.mark.campaign
@pytest.mark.usefixtures("slurm")
def test_a_slurm_array_of_two_with_one_task_killed_writes_the_same_bytes(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(UNITS):
        rows = [{"text": words(2000, 100 * number + row)} for row in range(100)]
        (tmp_path / f"part_{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = str(tmp_path / "part_*.jsonl")
    expected = content(
        prepare(PrepareOptions((corpus,), tmp_path / "expected", tokenizer_folder, workers=1, hold_out=0.1), QUIET)
    )
    submit = engines._submit
    submitted: list[str] = []

    def submit_and_kill(job: encode.Job, folder: Path, tasks: int, settings: JobSettings) -> str:
        identifier = submit(job, folder, tasks, settings)
        submitted.append(identifier)
        if len(submitted) == 1:
            deadline = time.monotonic() + 120
            while len(list((Path(job.out) / "units").glob("*.json"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            subprocess.run(["scancel", "--signal=KILL", "--full", f"{identifier}_1"], check=True)
        return identifier

    monkeypatch.setattr(engines, "_submit", submit_and_kill)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    out = tmp_path / "out"
    settings = JobSettings(partition="test", time="10m", directive=("--comment=ours",))
    options = PrepareOptions((corpus,), out, tokenizer_folder, engine="slurm", workers=2, hold_out=0.1, jobs=settings)
    assert content(prepare(options, QUIET)) == expected
    assert len(submitted) == 2
    assert (
        "#SBATCH --partition=test\n#SBATCH --time=00:10:00\n#SBATCH --comment=ours\n"
        in (out / "slurm" / "array.sh").read_text()
    )


def small_disk(tmp_path: Path, megabytes: int) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    return folder


def test_a_full_disk_leaves_nothing_corrupt_and_a_rerun_with_space_finishes(
    corpus: str, tokenizer_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    disk = small_disk(tmp_path, 1)
    try:
        options = PrepareOptions((corpus,), disk / "out", tokenizer_folder, workers=1, hold_out=0.1)
        filler = disk / "filler"
        filler.write_bytes(b"x" * 760_000)
        with pytest.raises(InputError, match=r"no space left .* free some and run the same command again"):
            prepare(options, QUIET)
        assert not (disk / "out" / "manifest.json").exists()
        filler.unlink()
        out = prepare(options, QUIET)
        assert content(out) == expected
        assert inspect_tokens(out)["problems"] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.campaign
@pytest.mark.parametrize("encoder", ["tokenizers", "gigatoken"])
def test_the_whole_shared_corpus_has_the_ids_of_tokenizers_document_by_document(
    shared: Path, tmp_path: Path, encoder: str
) -> None:
    from tokenizers import Tokenizer

    if encoder == "gigatoken":
        pytest.importorskip("gigatoken", reason="gigatoken is an extra: pip install 'argonne[fast]'")
    folder = shared / "data/pretrain"
    texts: list[str] = []
    for name in (
        "books.parquet",
        "c4_demo.jsonl",
        "fineweb_schema_0.parquet",
        "fineweb_schema_1.parquet",
        "tinyshakespeare.txt",
        "wiki_demo.txt",
    ):
        if name.endswith("parquet"):
            texts += parquet.read_table(folder / name, columns=["text"])["text"].to_pylist()
        elif name.endswith("jsonl"):
            texts += [json.loads(line)["text"] for line in (folder / name).read_text().splitlines()]
        else:
            texts.append((folder / name).read_text())
    patterns = tuple(str(folder / name) for name in ("*.parquet", "*.jsonl", "tiny*e.txt", "wiki_demo.txt"))
    options = PrepareOptions(patterns, tmp_path / "out", shared / "tokenizers/qwen3", encoder=encoder, workers=2)
    found = documents_of(prepare(options, QUIET))
    reference = Tokenizer.from_file(str(shared / "tokenizers/qwen3/tokenizer.json"))
    reference.encode_special_tokens = True
    assert len(found) == len(texts)
    for text, ids in zip(texts, found, strict=True):
        assert ids == [*reference.encode(text, add_special_tokens=False).ids, 151643]
