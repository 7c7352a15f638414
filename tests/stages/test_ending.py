"""How a training verb ends: a completed run leaves its report and says what to do next, and nothing of it is fatal."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.cli import main
from argonne.cli.command import build_parser
from argonne.config import Recipe
from argonne.errors import Stopped
from argonne.report.records import read_metrics
from argonne.stages.ending import finish_or_stop
from argonne.stages.pretrain import run
from argonne.train.trainer import Outcome

SHORT = {"train.steps": "2", "schedule.warmup": "0", "schedule.decay": "1"}


@pytest.fixture(scope="module")
def trained(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run whose name needs quotes, as the loop leaves it."""
    folder = tmp_path_factory.mktemp("ending") / "my run"
    keys = {
        "data.sources": f"[{{ path = {json.dumps(str(tokens))} }}]",
        "train.threads": "1",
        "eval.windows": "2",
        "checkpoint.sample_tokens": "2",
        "log.tensorboard": "false",
        **SHORT,
    }
    from argonne.recipe import load_recipe

    run(load_recipe("nano-2.5", keys), folder)
    return folder


@pytest.fixture
def complete(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / trained.name))


def ended(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the end of a verb prints on stderr; nothing goes to stdout."""
    capsys.readouterr()
    finish_or_stop(Outcome(2, "complete"), folder)
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def commands(said: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in re.findall(r"^ +argonne (.+)$", said, re.MULTILINE)]


def test_a_completed_run_has_its_report_and_is_told_what_to_do_next(
    complete: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ended(complete, capsys)
    assert "uPlot" in (complete / "report.html").read_text()
    assert str(complete / "report.html") in said
    assert [words[0] for words in commands(said)] == ["generate", "eval", "report", "export"]
    assert all(words[1] == str(complete) for words in commands(said))


def test_the_next_commands_run_as_they_are_printed(
    complete: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = ended(complete, capsys)
    monkeypatch.chdir(tmp_path)
    for words in commands(said):
        assert main(words) == 0, words
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_a_model_without_a_native_class_is_exported_with_its_own(
    nano: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(nano(**SHORT), tmp_path / "run")
    (export,) = [words for words in commands(ended(tmp_path / "run", capsys)) if words[0] == "export"]
    assert export[2:4] == ["--as", "hf"]


def test_a_run_without_held_out_text_is_told_to_bring_some(complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (complete / "metrics.jsonl").read_text().splitlines(keepends=True)
    (complete / "metrics.jsonl").write_text("".join(line for line in lines if '"held_out"' not in line))
    (measure,) = [words for words in commands(ended(complete, capsys)) if words[0] == "eval"]
    assert "--data" in measure
    assert build_parser(measure).parse_args(measure).data


def test_a_page_that_cannot_be_drawn_is_a_warning(
    complete: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr("argonne.report.report.write_report", broken)
    said = ended(complete, capsys)
    assert "warning: report.html is not written: RuntimeError: no font\n" in said
    assert len(commands(said)) == 4
    (record,) = read_metrics(complete).of("warning")
    assert (record["step"], record["message"]) == (2, "report.html is not written: RuntimeError: no font")
    monkeypatch.undo()
    assert "warning" not in ended(complete, capsys)  # the same command draws it once that can be done
    assert (complete / "report.html").is_file()


def test_a_page_that_is_there_is_not_drawn_again(complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(complete, capsys)
    before = (complete / "report.html").stat()
    assert len(commands(ended(complete, capsys))) == 4
    assert (complete / "report.html").stat() == before
    os.utime(complete / "report.html", (0, 0))  # the run went on since
    ended(complete, capsys)
    assert (complete / "report.html").stat().st_mtime > 0


def test_only_the_first_of_several_ranks_draws_and_speaks(
    complete: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert ended(complete, capsys) == ""
    assert not (complete / "report.html").exists()


def test_a_stopped_run_has_no_page_and_is_told_how_to_go_on(complete: Path) -> None:
    with pytest.raises(Stopped, match="the same command resumes it"):
        finish_or_stop(Outcome(1, "SIGTERM"), complete)
    assert not (complete / "report.html").exists()
