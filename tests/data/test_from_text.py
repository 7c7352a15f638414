"""Training from text: the rows, the order and the bytes of prepare and then training, whenever it is stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from argonne.config import BatchSection, DataSection, SourceSection
from argonne.data import encode, from_text
from argonne.data.loader import TrainingData, open_training_data
from argonne.data.prepare import PrepareOptions, prepare
from argonne.errors import InputError
from tests.data.conftest import words
from tests.data.test_prepare import QUIET, content

BATCH = BatchSection(tokens_per_step=64)


@pytest.fixture
def text(tmp_path: Path, tokenizer_folder: Path) -> DataSection:
    """Six files of text as a data section."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        rows = [{"text": words(40, 10 * number + row)} for row in range(6)]
        (folder / f"part_{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(input=("nowhere/*.jsonl", str(folder / "*.jsonl")), tokenizer=str(tokenizer_folder), sequence_length=16)


def prepared(text: DataSection, folder: Path) -> Path:
    assert text.tokenizer is not None
    return prepare(PrepareOptions((text.input[1],), folder, Path(text.tokenizer), workers=1), QUIET)


def rows_of(data: TrainingData, steps: range) -> list[Any]:
    with data.loader(0, 1, 4, prefetch=1) as loader:
        return [loader.batch(step).micro_batches[0]["input_ids"].tolist() for step in steps]


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_rows_are_those_of_prepare_and_then_training(text: DataSection, tmp_path: Path, order: str) -> None:
    data = open_training_data(dataclasses.replace(text, order=order), BATCH, 1, run_folder=tmp_path / "run")
    folder = prepared(text, tmp_path / "tokens")
    section = DataSection(sources=(SourceSection(path=str(folder), max_epochs=9),), sequence_length=16, order=order)
    ready = open_training_data(section, BATCH, 1)
    steps = range(2 * (ready.tokens_per_epoch // 64) + 3)
    assert rows_of(data, steps) == rows_of(ready, steps)
    data.close()
    assert content(tmp_path / "run" / "data") == content(folder)


def test_the_first_steps_are_there_before_the_last_text_is_tokenised(
    text: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_text.TextWork, "keep_going", lambda self: None)
    data = open_training_data(text, BATCH, 1, run_folder=tmp_path / "run")
    assert any("still being made" in line for line in data.description)
    assert any("not used: nowhere" in line for line in data.description)
    job = encode.Job(str(tmp_path / "run" / "data"))
    for number in (1, 0):
        job.run(number)
    ready = open_training_data(
        DataSection(sources=(SourceSection(path=str(prepared(text, tmp_path / "tokens"))),), sequence_length=16), BATCH, 1
    )
    with data.loader(0, 1, 4, prefetch=0) as loader:
        early = [loader.batch(step).micro_batches[0]["input_ids"].tolist() for step in range(5)]
    assert early == rows_of(ready, range(5))
    state = data.state(5)
    assert state["samples"] == 20
    assert 0 < data.passes(5)["text"] < 1


def test_a_killed_tokenising_process_is_started_again_and_nothing_changes(text: DataSection, tmp_path: Path) -> None:
    data = open_training_data(text, BATCH, 1, run_folder=tmp_path / "run")
    assert data.work is not None
    process = data.work._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert data.tokens_per_epoch > 0
    assert data.work._process is not process, "the work was done before it could be killed"
    data.close()
    assert content(tmp_path / "run" / "data") == content(prepared(text, tmp_path / "tokens"))


def test_a_run_resumes_from_text_as_if_it_had_not_stopped(text: DataSection, tmp_path: Path) -> None:
    data = open_training_data(text, BATCH, 1, run_folder=tmp_path / "run")
    state = json.loads(json.dumps(data.state(3)))
    data.close()
    again = open_training_data(text, BATCH, 1, run_folder=tmp_path / "run", state=state)
    assert json.loads(json.dumps(again.state(3))) == state
    after = rows_of(again, range(3, 9))
    again.close()
    ready = open_training_data(
        DataSection(sources=(SourceSection(path=str(prepared(text, tmp_path / "tokens"))),), sequence_length=16), BATCH, 1
    )
    assert after == rows_of(ready, range(3, 9))


def test_the_tokenising_process_ends_when_its_trainer_dies(text: DataSection, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            data = open_training_data(text, BATCH, 1, run_folder=tmp_path / "run")
            assert data.work is not None
            assert data.work._process is not None
            os.write(writer, str(data.work._process.pid).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    worker = int(os.read(reader, 20))
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_failure_while_tokenising_reaches_the_trainer(text: DataSection, tmp_path: Path) -> None:
    path = next(Path(text.input[1]).parent.glob("*_5.jsonl"))
    path.write_text("".join('{"text": 1}\n' for _ in range(50)))
    data = open_training_data(text, BATCH, 1, run_folder=tmp_path / "run")
    with pytest.raises(InputError, match="rows are no documents"):
        _ = data.tokens_per_epoch
    data.close()


def test_input_that_matches_nothing_names_all_patterns(text: DataSection, tmp_path: Path) -> None:
    section = dataclasses.replace(text, input=("a/*.txt", "b/*.txt"))
    with pytest.raises(InputError, match="none of 'a/"):
        open_training_data(section, BATCH, 1, run_folder=tmp_path / "run")
