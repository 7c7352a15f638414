"""Training from text: the rows, the order and the bytes of prepare and then training, whenever it is stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from argonne import layout
from argonne.config import BatchSection, DataSection, Recipe, SourceSection
from argonne.data.dataset import TrainingData, open_training_data
from argonne.data.loader import Loader
from argonne.errors import InputError, TextEnds
from argonne.prepare import encode, from_text
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.stages.pretrain import run
from argonne.train.checkpoint import list_checkpoints
from tests.prepare.helpers import QUIET, content
from tests.tokensets import words

BATCH = BatchSection(tokens_per_step=64)


@pytest.fixture
def text(tmp_path: Path, tokenizer_folder: Path) -> DataSection:
    """Six files of text as a data section."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        rows = [{"text": words(40, 10 * number + row)} for row in range(6)]
        (folder / f"part_{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(
        input=("nowhere/*.jsonl", str(folder / "*.jsonl")), tokenizer=str(tokenizer_folder), sequence_length=16
    )


def prepared(text: DataSection, folder: Path) -> Path:
    assert text.tokenizer is not None
    return prepare(PrepareOptions((text.input[1],), folder, Path(text.tokenizer), workers=1), QUIET)


def on(folder: Path) -> DataSection:
    return DataSection(sources=(SourceSection(path=str(folder), max_epochs=9),), sequence_length=16)


def rows_of(data: TrainingData, steps: range) -> list[Any]:
    with Loader(data, 0, 1, 4, prefetch=1) as loader:
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
        DataSection(sources=(SourceSection(path=str(prepared(text, tmp_path / "tokens"))),), sequence_length=16),
        BATCH,
        1,
    )
    with Loader(data, 0, 1, 4, prefetch=0) as loader:
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
        DataSection(sources=(SourceSection(path=str(prepared(text, tmp_path / "tokens"))),), sequence_length=16),
        BATCH,
        1,
    )
    assert after == rows_of(ready, range(3, 9))


def request_of(text: DataSection, run: Path) -> str:
    options = from_text.options_of(text, run)
    return json.dumps({**dataclasses.asdict(options), "out": str(options.out), "tokenizer": str(options.tokenizer)})


def test_a_tokenising_process_whose_trainer_died_before_it_began_does_nothing(
    text: DataSection, tmp_path: Path
) -> None:
    with subprocess.Popen(["true"]) as trainer:
        trainer.wait()
    command = [sys.executable, "-m", "argonne.prepare.from_text", request_of(text, tmp_path / "run"), str(trainer.pid)]
    assert subprocess.run(command, check=False).returncode == 1
    assert not (tmp_path / "run").exists()


def test_a_finish_between_two_looks_is_no_foreign_folder(
    text: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_plan = from_text.planning.open_plan

    def finished_by_another_rank(options: PrepareOptions, out: Path) -> dict[str, Any]:
        monkeypatch.setattr(from_text.planning, "open_plan", open_plan)
        prepare(options, QUIET)
        return opened(options, out)

    monkeypatch.setattr(from_text.planning, "open_plan", finished_by_another_rank)
    data = open_training_data(text, BATCH, 1, run_folder=tmp_path / "run")
    ready = open_training_data(on(prepared(text, tmp_path / "tokens")), BATCH, 1)
    assert rows_of(data, range(3)) == rows_of(ready, range(3))


def test_the_loser_of_a_race_for_the_work_leaves_no_failure_behind(
    text: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(text, tmp_path / "run")
    out = prepare(from_text.options_of(text, tmp_path / "run"), QUIET)
    before = content(out)

    def too_late(options: PrepareOptions) -> Path:
        raise InputError(f"{options.out}: exists and holds no plan")

    monkeypatch.setattr(from_text.prepare, "prepare", too_late)
    from_text.work_in_background(request)
    assert content(out) == before


class Ended:
    """A process that has ended with `code`."""

    pid = 0

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code


def starts_until_refused(
    text: DataSection, run: Path, monkeypatch: pytest.MonkeyPatch, code: int, units_between: int
) -> int:
    """How often the tokenising process is started, at most nine times, when each ends with `code` after it has finished
    `units_between`.
    """
    started: list[Ended] = []
    monkeypatch.setattr(
        from_text.subprocess, "Popen", lambda *arguments, **named: started.append(Ended(code)) or started[-1]
    )
    work = from_text.TextWork(from_text.options_of(text, run))
    with contextlib.suppress(InputError):
        for _ in range(9):
            work.keep_going()
            for _ in range(units_between):
                number = len(list((work.out / layout.UNITS).glob("*.json")))
                encode.Job(str(work.out)).run(number)
        return len(started)
    assert all(process.code for process in started)
    return len(started)


@pytest.mark.parametrize(("code", "starts"), [(-9, 3), (0, 9)], ids=["killed", "another rank's has the work"])
def test_a_process_that_dies_at_the_same_unit_is_started_three_times_and_one_that_steps_aside_at_any_time(
    text: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, starts: int
) -> None:
    assert starts_until_refused(text, tmp_path / "run", monkeypatch, code, 0) == starts


def test_deaths_with_finished_units_between_them_are_no_reason_to_give_up(
    text: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6, 12):
        path = Path(text.input[1]).parent / f"part_{number}.jsonl"
        path.write_text(json.dumps({"text": words(40, number)}) + "\n")
    assert starts_until_refused(text, tmp_path / "run", monkeypatch, -9, 1) == 9


def test_a_rank_without_the_files_is_sent_all_of_a_text_that_is_still_being_tokenised(
    text: DataSection, tmp_path: Path
) -> None:
    data = open_training_data(dataclasses.replace(text, reader="rank-0"), BATCH, 1, run_folder=tmp_path / "run")
    copy = pickle.loads(pickle.dumps(data))
    data.close()
    ready = open_training_data(on(prepared(text, tmp_path / "tokens")), BATCH, 1)
    assert copy.tokens_per_epoch == ready.tokens_per_epoch
    steps = range(copy.tokens_per_epoch // 64 + 2)
    assert [copy.state(step)["samples"] for step in steps] == [ready.state(step)["samples"] for step in steps]
    assert rows_of(data, steps) == rows_of(copy, steps)


def test_units_of_an_earlier_session_are_verified_before_the_text_is_complete(
    text: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_text.TextWork, "keep_going", lambda self: None)
    open_training_data(text, BATCH, 1, run_folder=tmp_path / "run")
    encode.Job(str(tmp_path / "run" / "data")).run(0)
    shard = tmp_path / "run" / "data" / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    again = open_training_data(dataclasses.replace(text, verify="before"), BATCH, 1, run_folder=tmp_path / "run")
    with pytest.raises(InputError, match="tokens-00000"):
        again.verify()


def test_a_failure_while_tokenising_reaches_the_trainer(text: DataSection, tmp_path: Path) -> None:
    path = next(Path(text.input[1]).parent.glob("*_5.jsonl"))
    path.write_text("".join('{"text": 1}\n' for _ in range(50)))
    data = open_training_data(text, BATCH, 1, run_folder=tmp_path / "run")
    with pytest.raises(TextEnds, match="rows are no documents"):
        _ = data.tokens_per_epoch
    with pytest.raises(TextEnds, match="rows are no documents"):
        data.close()


def test_text_that_is_tokenised_may_be_gone_and_a_pattern_that_matches_later_changes_nothing(
    text: DataSection, tmp_path: Path
) -> None:
    section = dataclasses.replace(text, input=(str(tmp_path / "later/*.jsonl"), text.input[1]))
    data = open_training_data(section, BATCH, 1, run_folder=tmp_path / "run")
    steps = range(data.tokens_per_epoch // 64)
    before = rows_of(data, steps)
    assert data.work is not None
    data.work.wait()
    data.close()
    Path(text.input[1]).parent.rename(tmp_path / "later")
    again = open_training_data(section, BATCH, 1, run_folder=tmp_path / "run")
    assert rows_of(again, steps) == before
    again.close()


def test_closing_does_not_wait_for_text_that_is_still_to_be_tokenised(
    text: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_text.TextWork, "keep_going", lambda self: None)
    data = open_training_data(text, BATCH, 1, run_folder=tmp_path / "run")
    loader = Loader(data, 0, 1, 4, prefetch=1)
    loader._read_ahead(-1)
    waiting = loader._ahead[0]
    loader.close()
    assert waiting.cancelled() or isinstance(waiting.exception(), InputError)
    data.close()


def test_input_that_matches_nothing_names_all_patterns(text: DataSection, tmp_path: Path) -> None:
    section = dataclasses.replace(text, input=("a/*.txt", "b/*.txt"))
    with pytest.raises(InputError, match="none of 'a/"):
        open_training_data(section, BATCH, 1, run_folder=tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value", "option"),
    [
        ("text_column", "content", ("text_column", "content")),
        ("quality_filter", True, ("filter", ("quality",))),
        ("hold_out", 0.25, ("hold_out", 0.25)),
        ("bos", True, ("bos", True)),
        ("max_drop_fraction", 0.5, ("max_drop_fraction", 0.5)),
    ],
)
def test_what_a_recipe_says_of_text_reaches_the_tokeniser(
    text: DataSection, tmp_path: Path, key: str, value: Any, option: tuple[str, Any]
) -> None:
    name, expected = option
    plain, asked = (
        from_text.options_of(section, tmp_path / "run") for section in (text, dataclasses.replace(text, **{key: value}))
    )
    assert (getattr(asked, name), getattr(plain, name) == expected) == (expected, False)


def with_faults(text: DataSection, name: str, faults: int) -> None:
    """More rows of one file that are no documents."""
    with open(next(Path(text.input[1]).parent.glob(name)), "a") as file:
        file.write("no json\n" * faults)


def untold(text: DataSection, run: Path, units: int, monkeypatch: pytest.MonkeyPatch) -> from_text.TextWork:
    """The work on a text of which so many units are finished, and nobody goes on."""
    monkeypatch.setattr(from_text.TextWork, "keep_going", lambda self: None)
    work = from_text.TextWork(from_text.options_of(text, run))
    for number in range(units):
        encode.Job(str(work.out)).run(number)
    return work


def test_too_many_faulty_rows_end_the_reading_as_soon_as_all_can_hold_no_fewer(
    text: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_faults(text, "*_1.jsonl", 40)
    untold(text, tmp_path / "run", 2, monkeypatch)
    with pytest.raises(TextEnds, match=r"40 of 52 rows are no documents \(invalid-json 40\), more than .* or so"):
        open_training_data(text, BATCH, 1, run_folder=tmp_path / "run")


def test_a_part_with_many_faulty_rows_does_not_end_the_reading_of_a_text_that_may_hold_them(
    text: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_faults(text, "*_0.jsonl", 3)
    untold(text, tmp_path / "run", 2, monkeypatch)
    data = open_training_data(text, BATCH, 1, run_folder=tmp_path / "run")
    assert "  so far 15 rows = 12 documents + 3 dropped (invalid-json 3)" in data.description
    assert len(rows_of(data, range(5))) == 5


def test_prepare_stops_at_the_unit_after_which_too_many_rows_are_faulty(text: DataSection, tmp_path: Path) -> None:
    for number in range(3):
        with_faults(text, f"*_{number}.jsonl", 40)
    with pytest.raises(InputError, match=r"40 of 46 rows are no documents .* or so that there will be; mend the input"):
        prepared(text, tmp_path / "out")
    assert len(list((tmp_path / "out" / layout.UNITS).glob("*.json"))) == 1


def test_a_failure_after_the_last_tokens_that_a_run_needs_is_told_too(
    text: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_faults(text, "*_5.jsonl", 900)
    with monkeypatch.context() as patch:
        untold(text, tmp_path / "run", 2, patch)
        data = open_training_data(text, BATCH, 1, run_folder=tmp_path / "run")
        loader = Loader(data, 0, 1, 4, prefetch=0)
        loader.batch(0)
    assert loader.wrong() is None
    assert data.work is not None
    assert data.work._process is not None
    data.work._process.wait()
    with pytest.raises(TextEnds, match="rows are no documents"):
        loader.batch(1)
    assert isinstance(loader.wrong(), TextEnds)
    with pytest.raises(TextEnds, match="rows are no documents"):
        data.close()


def test_a_run_whose_own_text_has_too_many_faulty_rows_is_not_complete_until_that_is_allowed(
    text: DataSection, nano: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_faults(text, "*_0.jsonl", 3)
    keys = {
        "data.sources": "[]",
        "data.input": json.dumps([text.input[1]]),
        "data.tokenizer": json.dumps(text.tokenizer),
        "train.steps": "3",
        "schedule.warmup": "0",
        "eval.every_steps": "0",
        "data.sequence_length": "16",
        "batch.tokens_per_step": "64",
    }
    untold(text, tmp_path / "run", 2, monkeypatch)
    with pytest.raises(TextEnds, match="3 of 9 rows are no documents"):
        run(nano(**keys), tmp_path / "run")
    assert [saved.step for saved in list_checkpoints(tmp_path / "run")] == [2]
    assert not (tmp_path / "run" / layout.COMPLETE).exists()
    allowed = nano(**keys, **{"data.max_drop_fraction": "0.5"})
    assert run(allowed, tmp_path / "run", allow=["data.max_drop_fraction"]).outcome.complete


def test_rows_of_one_format_say_nothing_of_how_many_another_will_have(text: DataSection, tmp_path: Path) -> None:
    folder = Path(text.input[1]).parent
    for number in range(3):
        (folder / f"a_{number}.txt").write_bytes(b"\xff" * 2000)
    assert text.tokenizer is not None
    out = prepare(PrepareOptions((str(folder / "*"),), tmp_path / "out", Path(text.tokenizer), workers=1), QUIET)
    assert json.loads((out / layout.MANIFEST).read_text())["drops"] == {"invalid-utf8": 3}
