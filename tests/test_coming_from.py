"""docs/coming-from.md: each command of the earlier scripts has a form here, and each of these is understood."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from argonne.cli import main
from argonne.cli.command import ALL_VERBS, build_parser
from tests.tour import ROOT

PAGE = ROOT / "docs" / "coming-from.md"
EARLIER = (
    "model.py", "data_processing.py", "training_utils.py", "preprocess_data.py", "pretrain.py", "training.py",
    "mp_pretrain.py", "train_with_fsdp.py", "continue_pretrain.py", "resume_pretrain.py", "midtraining.py", "sft.py",
    "dpo.py", "cot-sft.py", "instruct_finetuning.py", "run_instruct_finetuning.sh", "inference.py", "convert_model.py",
    "push_model_to_hf.py", "eval_sft_quality.py", "--data-glob", "--no-streaming", "--tokenizer-path",
    "--trust-remote-code", "--learning-rate", "--min-learning-rate", "--warmup-steps", "--max-steps", "--batch-size",
    "--block_size", "--bf16", "--fp16", "--checkpoint-path", "--wall_time", "MASTER_ADDR",
)  # fmt: skip
TRAINING = ("pretrain", "continue", "midtrain", "sft", "cot-sft", "dpo")
# What one option asks for beside itself: tokens that are made while it trains, rows that fill a step.
BESIDE = {
    "data.input": "--data.tokenizer tok",
    "data.prefetch": """--data.input '["a.txt"]' --data.tokenizer tok""",
    "data.tokenizer": """--data.input '["a.txt"]'""",
    "data.sequence_length": "--batch.tokens_per_step 245760",
    "schedule.min_lr": "--schedule.min_ratio none",
    "train.steps": "--train.tokens none",
}


def forms(section: str) -> list[str]:
    """What stands in code in the right column of a section's table, of more than one word."""
    table = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    right = [line.split(" | ", 1)[1] for line in table.splitlines() if line.startswith("| ") and " | " in line]
    return [code for cell in right for code in re.findall(r"`([^`]+)`", cell) if " " in code]


COMMANDS = [form for form in forms("Scripts") if form.startswith("argonne ")]
OPTIONS = [form for form in forms("Options") if re.match(r"--[a-z]+(\.[a-z_]+)? ", form) and "--run" not in form]


def test_every_earlier_script_and_option_is_on_the_page() -> None:
    text = PAGE.read_text()
    assert [name for name in EARLIER if f"`{name}" not in text] == []
    assert len(COMMANDS) >= 20
    assert len(OPTIONS) >= 20


@pytest.mark.parametrize("command", COMMANDS)
def test_the_new_form_of_a_command_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)[1:]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')  # a job is not handed in without it
    if words[0] == "publish" and "publish" not in ALL_VERBS:
        pytest.skip("publish is not in this tree yet")
    if words[0] not in (*TRAINING, "launch"):
        assert build_parser(words).parse_known_args(words)[1] == []
        return
    assert main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    if words[0] == "launch":
        assert "#PBS -l walltime=12:00:00" in printed
        assert "argonne-1.0-sft" in printed
    else:
        stage = "pretrain" if words[0] == "continue" else words[0]
        assert tomllib.loads(printed)["stage"] == stage
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]


@pytest.mark.parametrize("option", OPTIONS)
def test_the_new_form_of_an_option_is_what_then_runs(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(option)
    key = words[0].removeprefix("--")
    assert main(["pretrain", "argonne-3.0-pretrain", *words, *shlex.split(BESIDE.get(key, "")), "--dry-run"]) == 0
    found = tomllib.loads(capsys.readouterr().out)
    for part in key.split("."):
        found = found[part]
    assert str(found).replace("'", '"') == words[1] or found == float(words[1])


@pytest.mark.parametrize("name", re.findall(r"`(argonne\.[a-z]+)`", PAGE.read_text()))
def test_a_module_that_the_page_names_is_there(name: str) -> None:
    assert importlib.import_module(name).__name__ == name
