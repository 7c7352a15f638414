"""Through the command line, on a machine where things happen: workers are killed, files are cut or grow while they are
read, the input comes in ten thousand units. It ends in the same bytes, or in one line and exit code 2.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from argonne.prepare.columnar import ARROW_BATCHES
from argonne.tokens.formats import open_tokens
from tests.prepare.helpers import arguments, content
from tests.tokensets import words

FILES, ROWS = 24, 1500


def write_rows(path: Path, texts: list[str]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif path.suffix == ".txt":
        path.write_text("\n".join(texts))
    elif path.suffix == ".parquet":
        parquet.write_table(pa.table({"text": texts}), path, row_group_size=300)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema({"text": pa.string()})) as writer:
            writer.write_table(pa.table({"text": texts}), max_chunksize=100)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [words(40, number) for number in range(ROWS)]


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(FILES):
        suffix = ("jsonl", "parquet", "arrow", "txt")[number % 4]
        write_rows(folder / f"in_{number:02d}.{suffix}", texts[number:] + texts[:number])
    return folder


def begin(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, "-m", "argonne", *command], stderr=open(log, "wb"), stdout=subprocess.DEVNULL, env=environment
    )


def children(process: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    found = [int(pid) for task in Path(f"/proc/{process}/task").glob("*/children") for pid in task.read_text().split()]
    return found + [deeper for child in found for deeper in children(child)]


def until_finished(out: Path, units: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait until so many units are finished; False where the process ended before."""
    while len(list((out / "units").glob("[0-9]*.json"))) < units:
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    return True


def workers_of(process: int) -> list[int]:
    """Those of its children that encode: multiprocessing's resource tracker is none."""
    return [
        pid
        for pid in children(process)
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes() and os.path.exists(f"/proc/{pid}")
    ]


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(4))
def test_workers_that_are_killed_are_replaced(corpus: Path, tokenizer_folder: Path, tmp_path: Path, seed: int) -> None:
    expected = begin(arguments(corpus, tokenizer_folder, tmp_path / "expected"), tmp_path / "log")
    assert expected.wait() == 0
    command = arguments(corpus, tokenizer_folder, tmp_path / "out")
    command[command.index("--workers") + 1] = "2"
    process, generator, kills = begin(command, tmp_path / "log"), random.Random(seed), 0
    for units in sorted(generator.sample(range(FILES - 4), 3)):
        if until_finished(tmp_path / "out", units, process) and (workers := workers_of(process.pid)):
            os.kill(generator.choice(workers), signal.SIGKILL)
            kills += 1
    assert process.wait() == 0, (tmp_path / "log").read_text()
    assert kills
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def gone(path: Path) -> None:
    path.unlink()


def longer(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more of it\n" * 500)


@pytest.mark.campaign
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("change", [shorter, empty, gone, longer])
def test_files_that_change_while_they_are_read_end_in_a_line_or_do_not_matter(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, change: Callable[[Path], None], workers: int
) -> None:
    command = arguments(corpus, tokenizer_folder, tmp_path / "out")
    command[command.index("--workers") + 1] = str(workers)
    for number, units in enumerate((1, 3, 5, 7)):  # the formats in turn; what comes later in the order of the plan
        process = begin(command, tmp_path / "log")
        assert until_finished(tmp_path / "out", units + 4 * number, process), (tmp_path / "log").read_text()
        path = sorted(corpus.iterdir())[-4 + number]
        kept = path.read_bytes()
        change(path)
        code, said = process.wait(), (tmp_path / "log").read_text()
        assert code in (0, 2), said
        assert "Traceback" not in said
        if code == 2:
            assert said.splitlines()[-1].startswith("argonne: ")
            assert path.name in said.splitlines()[-1]
        path.write_bytes(kept)
        if code == 0:
            break
    assert subprocess.run([sys.executable, "-m", "argonne", *command], capture_output=True).returncode in (0, 2)


def batches(texts: list[str], count: int) -> Iterator[pa.RecordBatch]:
    schema = pa.schema({"text": pa.string()})
    for number in range(count):
        yield pa.record_batch({"text": [texts[number % len(texts)][:30] + str(number)]}, schema=schema)


@pytest.mark.campaign
def test_ten_thousand_units_are_prepared_opened_and_read(
    texts: list[str], tokenizer_folder: Path, tmp_path: Path
) -> None:
    units = 10_000
    with (
        pa.OSFile(str(tmp_path / "in.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, pa.schema({"text": pa.string()})) as writer,
    ):
        for batch in batches(texts, units * ARROW_BATCHES):
            writer.write_batch(batch)
    command = arguments(tmp_path / "in.arrow", tokenizer_folder, tmp_path / "out", "--hold-out", "0.01", "--dedup")
    command[command.index("--workers") + 1] = "2"
    process = begin(command, tmp_path / "log")
    assert until_finished(tmp_path / "out", units // 3, process)
    process.kill()
    process.wait()
    assert subprocess.run([sys.executable, "-m", "argonne", *command], capture_output=True).returncode == 0
    opened = open_tokens(tmp_path / "out")
    assert len(opened.train.shards) == units
    assert opened.documents is not None
    assert opened.documents + (opened.held_out.documents or 0) == units * ARROW_BATCHES
    assert opened.train.document_ends[-1] == opened.tokens
    inspected = subprocess.run(
        [sys.executable, "-m", "argonne", "inspect", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert inspected.returncode == 0, inspected.stderr
