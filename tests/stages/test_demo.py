"""The demo at a tenth, with few modules: what it makes, what it says, that it goes on after an interruption. Its
floors, at full size with three seeds. And its corpus.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from argonne.cli.command import build_parser, parse_overrides
from argonne.errors import InputError, Stopped
from argonne.recipe import load_recipe
from argonne.report.records import read_metrics
from argonne.stages.corpus import MODULES, write_corpus
from argonne.stages.demo import LESSONS, run_demo

FEW = ("json", "csv", "argparse", "textwrap", "string", "shutil", "logging", "pathlib", "statistics", "typing")
STAGES = [*(lesson.verb for lesson in LESSONS), "model"]
Finished = tuple[Path, str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished demo's folder, everything it said, and what it measured."""
    out = tmp_path_factory.mktemp("demo") / "a folder"
    said: list[str] = []
    measured = run_demo(out, scale=0.1, modules=FEW, log=said.append)
    return out, "\n".join(said), measured


def test_the_demo_goes_the_whole_way_and_leaves_a_model_and_a_report(finished: Finished) -> None:
    out, _, measured = finished
    assert list(measured) == STAGES
    for name in ("corpus.jsonl", "tokenizer/tokenizer.json", "documentation/manifest.json", "model/config.json"):
        assert (out / name).is_file(), name
    for lesson in LESSONS:
        assert (out / lesson.verb / "COMPLETE").is_file()
        assert (out / lesson.verb / "report.html").is_file()
    assert json.loads((out / "model" / "config.json").read_text())["max_position_embeddings"] == 1024


def test_each_stage_begins_with_the_weights_of_the_one_before(finished: Finished) -> None:
    out, _, _ = finished
    for lesson in LESSONS[1:]:
        parent = json.loads((out / lesson.verb / "manifest.json").read_text())["parent"]
        before = json.loads((out / str(lesson.start) / "manifest.json").read_text())
        assert parent["run_id"] == before["run_id"]


def test_it_stops_and_resumes_once_on_the_way(finished: Finished) -> None:
    metrics = read_metrics(finished[0] / "pretrain")
    assert [record["step"] for record in metrics.of("stop")] == [17]
    assert [record["step"] for record in metrics.of("resume")] == [17]
    assert metrics.records[-1]["step"] == 34
    assert "Stopped on purpose after step 17" in finished[1]


def test_what_each_stage_changed_stands_side_by_side_on_the_page(finished: Finished) -> None:
    out, _, measured = finished
    page = (out / "report.html").read_text()
    head = re.findall(r"<th>(.*?)</th>", page)
    assert head == [*STAGES, "question", *STAGES]
    for found in measured.values():
        assert f"{found['bpb']['bits_per_byte']:.3f}<" in page
        assert f"{found['sums']['sampled']['sentences']:.1%}<" in page
    for lesson in LESSONS:
        assert (out / re.findall(rf'href="([^"]*{lesson.verb}/[^"]*)"', page)[0]).is_file()


def test_it_sets_the_models_bits_per_byte_beside_the_baselines(finished: Finished) -> None:
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


def test_the_commands_it_shows_are_understood_by_the_command_line(finished: Finished) -> None:
    commands = [shlex.split(line) for line in re.findall(r"^ +(?:\$ )?argonne (.+)$", finished[1], re.MULTILINE)]
    verbs = {command[0] for command in commands}
    assert {lesson.verb for lesson in LESSONS} | {"tokenizer", "prepare", "merge", "eval", "chat", "report"} < verbs
    for command in commands:
        options, rest = build_parser(command).parse_known_args(command)
        if "recipe" in options:
            load_recipe(options.recipe, parse_overrides(rest))
        else:
            assert rest == []


def test_a_second_demo_in_the_same_folder_finds_everything_done(finished: Finished) -> None:
    out, _, measured = finished
    names = [path for path in out.rglob("*") if path.name in ("metrics.jsonl", "model.safetensors")]
    before = {path: path.read_bytes() for path in names}
    assert run_demo(out, scale=0.1, modules=FEW, log=lambda text: None) == measured
    assert {path: path.read_bytes() for path in names} == before


def test_a_demo_that_was_begun_otherwise_is_not_gone_on_with(finished: Finished) -> None:
    with pytest.raises(InputError, match=r"was begun with .*0\.1.* now .*'seed': 3"):
        run_demo(finished[0], seed=3, scale=0.1)


def test_a_request_to_stop_ends_the_demo_and_the_same_demo_goes_on(tmp_path: Path) -> None:
    def request(text: str) -> None:
        if "Stopped on purpose" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="SIGTERM"):
        run_demo(tmp_path / "demo", scale=0.02, modules=FEW[:2], log=request)
    assert not (tmp_path / "demo" / "pretrain" / "COMPLETE").exists()
    assert (tmp_path / "demo" / "pretrain" / "checkpoint_last").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is no demo folder"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_way_at_full_size_ends_with_a_model_that_reasons(seed: int, tmp_path: Path) -> None:
    found = run_demo(tmp_path / "demo", seed=seed)
    for name, tasks in found.items():
        sums, turns = tasks["sums"], tasks["turns"]
        shares = {key: sums[key] for key in ("exact_match", "closed", "consistent", "sentences")}
        sampled = sums["sampled"]["sentences"]
        print(seed, name, shares, sampled, turns["exact_match"], tasks["bpb"]["bits_per_byte"])
    assert max(found[name]["sums"]["exact_match"] for name in ("pretrain", "midtrain", "sft")) <= 0.05
    for name in ("cot-sft", "dpo", "model"):
        assert found[name]["sums"]["exact_match"] >= 0.80
        assert min(found[name]["sums"][key] for key in ("closed", "consistent")) >= 0.95
        assert found[name]["turns"]["exact_match"] >= 0.85
    assert 0.2 <= found["cot-sft"]["sums"]["sampled"]["sentences"] <= 0.8
    assert found["dpo"]["sums"]["sampled"]["sentences"] >= 0.95
    assert found["dpo"]["sums"]["exact_match"] >= found["cot-sft"]["sums"]["exact_match"] - 0.05


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
