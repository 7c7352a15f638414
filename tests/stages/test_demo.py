"""The demo with few modules and few steps: what it makes, what it says, that it goes on after an interruption. And its
corpus.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from argonne.errors import InputError
from argonne.report.records import read_metrics
from argonne.stages.corpus import MODULES, write_corpus
from argonne.stages.demo import run_demo

FEW = ("json", "csv", "argparse", "textwrap", "string", "shutil", "logging", "pathlib", "statistics", "typing")
SHORT = {
    "train.steps": "8",
    "schedule.warmup": "2",
    "batch.tokens_per_step": "512",
    "eval.every_steps": "4",
    "log.every_steps": "1",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished demo's folder and everything it said."""
    out = tmp_path_factory.mktemp("demo") / "a folder"
    said: list[str] = []
    run_demo(out, overrides=SHORT, modules=FEW, log=said.append)
    return out, "\n".join(said)


def test_the_demo_leaves_a_model_a_report_and_the_data(finished: tuple[Path, str]) -> None:
    out, _ = finished
    for name in (
        "corpus.jsonl",
        "tokens/manifest.json",
        "tokens/tokenizer/tokenizer.json",
        "run/report.html",
        "run/COMPLETE",
        "run/final_model/config.json",
    ):
        assert (out / name).is_file(), name


def test_it_stops_and_resumes_once_on_the_way(finished: tuple[Path, str]) -> None:
    metrics = read_metrics(finished[0] / "run")
    assert [record["step"] for record in metrics.of("stop")] == [4]
    assert [record["step"] for record in metrics.of("resume")] == [4]
    assert metrics.series("step", "loss")[0] == list(range(1, 9))
    assert "Stopped on purpose after step 4" in finished[1]


def test_it_sets_the_models_bits_per_byte_beside_the_baselines(finished: tuple[Path, str]) -> None:
    figures = {
        name: float(value) for name, value in re.findall(r"^ {6}(\S.*?) {2,}(\d+\.\d{3})", finished[1], re.MULTILINE)
    }
    assert list(figures)[-1] == "this model"
    assert {"xz -9", "bigram model, same tokens", "xz -9 behind the training text"} < set(figures)
    assert (
        figures["bigram model, same tokens"]
        < figures["token frequencies (unigram)"]
        < figures["all 2,048 tokens as likely"]
    )


def test_it_names_the_verb_of_each_stage_and_says_what_to_try_next(finished: tuple[Path, str]) -> None:
    for verb in ("prepare", "pretrain", "eval", "generate", "report"):
        assert f"$ argonne {verb} " in finished[1]
    assert "What to try next" in finished[1]


def test_the_commands_it_shows_are_understood_by_the_command_line(finished: tuple[Path, str]) -> None:
    import shlex

    from argonne.cli.command import build_parser, parse_overrides
    from argonne.recipe import load_recipe

    commands = [shlex.split(line) for line in re.findall(r"^ +(?:\$ )?argonne (.+)$", finished[1], re.MULTILINE)]
    assert len(commands) >= 10
    for command in commands:
        options, rest = build_parser(command).parse_known_args(command)
        if options.verb == "pretrain":
            load_recipe(options.recipe, parse_overrides(rest))
        else:
            assert rest == []


def test_a_second_demo_in_the_same_folder_finds_everything_done(finished: tuple[Path, str]) -> None:
    out, _ = finished
    before = (out / "run" / "metrics.jsonl").read_bytes()
    run_demo(out, overrides=SHORT, modules=FEW, log=lambda text: None)
    assert (out / "run" / "metrics.jsonl").read_bytes() == before


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is no demo folder"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# --------------------------------------------------------------------------------------------------------- corpus


def make_library(folder: Path) -> Path:
    long = "Explains something at length, so that it is not left out for being short. " * 2
    (folder / "pydoc_data").mkdir(parents=True)
    (folder / "pydoc_data" / "topics.py").write_text(f"topics = {{'if': 'The if statement. {long}'}}\n")
    (folder / "trap.py").write_text(
        f'"""{long}"""\nraise SystemExit("this module was run")\n'
        f'def walk(top, *, follow=False):\n    """Walks. {long}"""\n'
    )
    (folder / "kit").mkdir()
    (folder / "kit" / "__init__.py").write_text(
        f'class Box(dict):\n    """A box. {long}"""\n    def open(self):\n        """Short."""\n'
    )
    (folder / "kit" / "tests").mkdir()
    (folder / "kit" / "tests" / "check.py").write_text(f'"""Not for readers. {long}"""\n')
    return folder


def test_the_corpus_is_read_without_running_a_line_of_it(tmp_path: Path) -> None:
    before = set(sys.modules)
    corpus = write_corpus(
        tmp_path / "corpus.jsonl", modules=("trap", "kit", "gone"), library=make_library(tmp_path / "lib")
    )
    rows = {row["source"]: row["text"] for row in map(json.loads, corpus.path.read_text().splitlines())}
    assert list(rows) == ["topic if", "trap", "trap.walk", "kit.Box"]
    assert rows["trap.walk"].startswith("trap.walk(top, *, follow=False)\n\nWalks.")
    assert "class kit.Box(dict)" in rows["kit.Box"]
    assert "kit.Box.open(self)\n\nShort." in rows["kit.Box"]
    assert (corpus.documents, corpus.modules, corpus.missing) == (4, 2, ("gone",))
    assert corpus.bytes == sum(len(text.encode()) for text in rows.values())
    assert set(sys.modules) == before


def test_short_and_repeated_entries_are_counted(tmp_path: Path) -> None:
    said = "Long enough to be kept, because it says more than the other one does. And more. And more."
    kept = f'def g():\n    """{said}"""\n'
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text('def f():\n    """Short."""\n' + kept * 2)
    corpus = write_corpus(tmp_path / "corpus.jsonl", modules=("a",), library=tmp_path / "lib")
    assert (corpus.documents, corpus.too_short, corpus.repeated) == (1, 1, 1)


def test_a_python_without_sources_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no documentation strings found"):
        write_corpus(tmp_path / "corpus.jsonl", library=tmp_path)


def test_this_pythons_corpus_is_large_and_the_same_each_time(tmp_path: Path) -> None:
    first = write_corpus(tmp_path / "a.jsonl")
    second = write_corpus(tmp_path / "b.jsonl")
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.bytes > 1_000_000
    assert len(first.missing) < len(MODULES) // 10
