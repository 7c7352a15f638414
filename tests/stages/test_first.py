"""`argonne train`: first hours with text as people have it, what is kept, what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from argonne.cli import main
from argonne.recipe import load_recipe
from argonne.stages import pretrain
from argonne.train.guard import StopWatch

BRIEF = ("--hours", "0.0005", "--checkpoint.sample_tokens", "8", "--log.tensorboard", "false")
PAGES = list(topics.values())


def folder_of_txt(place: Path) -> Path:
    place.mkdir()
    for number, page in enumerate(PAGES):
        (place / f"{number}.txt").write_text(page)
    return place


def one_big_txt(place: Path) -> Path:
    return _written(place.with_suffix(".txt"), "\n\n".join(PAGES).encode())


def jsonl_dump(place: Path) -> Path:
    rows = "".join(json.dumps({"text": page, "id": number}) + "\n" for number, page in enumerate(PAGES))
    return _written(place.with_suffix(".jsonl.zst"), zstandard.compress(rows.encode()))


def parquet_folder(place: Path) -> Path:
    place.mkdir()
    for number in range(2):
        pq.write_table(pa.table({"text": PAGES[number::2]}), place / f"part-{number}.parquet")
    return place


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "text", [folder_of_txt, one_big_txt, jsonl_dump, parquet_folder], ids=lambda make: make.__name__
)
def test_a_first_hour_ends_with_a_model_a_report_text_and_an_export_of_a_stock_class(
    text: Callable[[Path], Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = text(here / "mine")
    assert main(["train", given.name, *BRIEF]) == 0
    said = capsys.readouterr().err
    assert re.search(r"^  \$ argonne prepare --input mine\S* --train-tokenizer 2048 ", said, re.MULTILINE)
    assert re.search(r"^  1\.\d\dM parameters: 4 layers of width 128, 2,048 entries", said, re.MULTILINE)
    assert "(measured just now)" in said
    run = Path("trained", "run")
    assert (run / "COMPLETE").is_file()
    assert "held-out" in (run / "report.html").read_text()
    # The commands that it ends with, as they stand.
    following = [line.split("  #")[0].split() for line in re.findall(r"^  argonne (.+)$", said, re.MULTILINE)]
    for command in (words for words in following if words[0] == "export"):
        assert main(command) == 0
    assert main(["generate", str(run), "--prompt", "The ", "--max-new-tokens", "8"]) == 0
    assert len(capsys.readouterr().out) > len("The ")
    check_a_stock_class_opens(Path("exports", "run"))


def check_a_stock_class_opens(export: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(export)
    tokenizer: Any = AutoTokenizer.from_pretrained(export)
    assert type(model).__module__.startswith("transformers.")
    asked = tokenizer("The ", return_tensors="pt")
    assert model.generate(**asked, max_new_tokens=4, min_new_tokens=4).shape[1] == asked["input_ids"].shape[1] + 4


def test_the_recipe_is_kept_edited_and_gone_on_with(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_txt(here / "mine")
    command = ["train", "mine", *BRIEF, "--train.steps", "6", "--seed", "3"]
    assert main([*command, "--stop.wall_time", "0s"]) == 3
    recipe = Path("trained", "recipe.toml")
    text = recipe.read_text()
    assert load_recipe(str(recipe)).seed == 3
    assert all("# " in line for line in text.splitlines() if " = " in line)
    assert "seed = 3  # as given" in text
    recipe.write_text(text.replace('wall_time = "0s"', "").replace("every_steps = 1 ", "every_steps = 2 "))
    capsys.readouterr()
    assert main([*command, "--stop.wall_time", "0s"]) == 0
    assert "recipe.toml is there already, and is what runs" in capsys.readouterr().err
    assert json.loads(Path("trained/run/COMPLETE").read_text())["step"] == 6
    before = Path("trained/run/metrics.jsonl").read_bytes()
    assert main([*command, "--stop.wall_time", "0s"]) == 0
    assert "trained/run is complete" in capsys.readouterr().err
    assert Path("trained/run/metrics.jsonl").read_bytes() == before
    assert main(["train", "mine", *BRIEF, "--train.steps", "6", "--seed", "4"]) == 2
    assert re.search(r"was begun with --seed '3', now '4'; --stop.wall_time '0s', now None", capsys.readouterr().err)


def test_a_dry_run_prints_a_recipe_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_big_txt(here / "mine")
    assert main(["train", "mine.txt", "--dry-run", "--schedule.kind", "cosine", "--batch.micro", "2"]) == 0
    found = capsys.readouterr()
    recipe = tomllib.loads(found.out)
    assert recipe["schedule"] == {"kind": "cosine", "warmup": recipe["schedule"]["warmup"]}
    assert recipe["batch"]["micro"] == 2
    size = Path("mine.txt").stat().st_size / 1e6  # the documentation that this Python carries
    assert f"estimated from {size:.1f} MB of files; nothing is written" in found.err
    assert [path.name for path in here.iterdir()] == ["mine.txt"]


WRONG = {
    "text that is not there": (["none"], "matches no file"),
    "a key that is not known": (["mine.txt", "--train.stepz", "3"], "unknown recipe key 'train.stepz'"),
    "sources of its own": (["mine.txt", "--data.sources", "tokens/a"], "--data.sources: the command's TEXT says it"),
    "a stage of its own": (["mine.txt", "--stage", "sft"], "--stage: the command's TEXT says it"),
    "no time": (["mine.txt", "--hours", "0"], "--hours: found 0, expected more than 0"),
    "less than no time": (["mine.txt", "--hours", "-1"], "--hours: found -1, expected more than 0"),
    "a tokenizer that is not there": (["mine.txt", "--tokenizer", "none"], "none"),
    "a folder of other things": (["mine.txt", "--out", "other"], "--out other: exists, and was not made by"),
    "a folder within the text": (["other", "--out", "other/out"], "--out other/out: lies in other, whose text is read"),
    "too little text": (["other"], "about 1 tokens to train on, expected at least 10,000"),
    "a model that fits nowhere": (["mine.txt", "--model.hidden_size", "1000000"], "the run would be refused"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(fault: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_big_txt(here / "mine")
    (here / "other").mkdir()
    (here / "other" / "a.txt").write_text("little")
    words, message = WRONG[fault]
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (here / "trained").exists()


def test_text_that_came_later_is_refused_by_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_txt(here / "mine")
    assert main(["train", "mine", *BRIEF, "--stop.wall_time", "0s"]) == 3
    (here / "mine" / "later.txt").write_text("more")
    assert main(["train", "mine", *BRIEF, "--stop.wall_time", "0s"]) == 2
    assert "later.txt came or changed since it was made" in capsys.readouterr().err


def test_an_interruption_while_preparing_ends_as_a_stop(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    one_big_txt(here / "mine")
    monkeypatch.setattr("argonne.stages.first.prepare", interrupted)
    assert main(["train", "mine.txt", *BRIEF]) == 3
    assert "argonne: stopped; the same command goes on in trained" in capsys.readouterr().err


def test_an_interruption_of_training_stops_it_and_the_same_command_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any, watch: StopWatch, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return run(*arguments, watch=watch, **more)

    run = pretrain.run
    one_big_txt(here / "mine")
    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "run", interrupt)
        assert main(["train", "mine.txt", *BRIEF]) == 3
    assert "SIGINT" in capsys.readouterr().err
    assert main(["train", "mine.txt", *BRIEF]) == 0
