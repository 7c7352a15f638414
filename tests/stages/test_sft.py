"""sft and cot-sft through the loop: what is trained, what is kept, exact resume, every key, what bad input is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.evaluate.probes import QUESTIONS
from argonne.evaluate.run import evaluate
from argonne.layout import CONVERSATIONS, Kind, kind_of
from argonne.report.records import read_metrics
from argonne.report.report import write_report
from argonne.stages.pretrain import RunResult, run
from argonne.stages.sft import SFT
from argonne.tokens.tokenizer import load_tokenizer
from argonne.train.checkpoint import LAST
from tests.train.helpers import curve, stored
from tests.tuning import conversations, write

Chat = Callable[..., Recipe]


def tune(recipe: Recipe, folder: Path, **how: Any) -> RunResult:
    return run(recipe, folder, stage=SFT, **how)


def test_a_base_model_becomes_a_chat_model_that_others_can_load(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tune(chat(), tmp_path / "run")
    assert result.outcome.complete
    final = tmp_path / "run" / "final_model"
    tokenizer = load_tokenizer(final)
    turn_end = tokenizer.token_to_id("<|im_end|>")
    assert turn_end in json.loads((final / "generation_config.json").read_text())["eos_token_id"]
    assert "<|im_start|>" in (final / "chat_template.jinja").read_text()
    assert "<|im_start|>" in (tmp_path / "run" / LAST / "tokenizer" / "chat_template.jinja").read_text()
    held_out = read_metrics(tmp_path / "run").of("held_out")
    assert held_out
    assert all(record["loss"] > 0 for record in held_out)
    kept = [path for path in (tmp_path / "run" / CONVERSATIONS).iterdir() if path.is_dir()]
    assert [kind_of(path) for path in kept] == [Kind.NOTHING]  # no token set, which would be found damaged
    said = capsys.readouterr().err
    assert "60 rows = 60 used" in said
    assert "«It is 0.<|im_end|>»" in said


def test_a_fine_tuning_run_that_was_stopped_is_the_one_that_was_not(chat: Chat, tmp_path: Path) -> None:
    tune(chat(), tmp_path / "whole")
    tune(chat(), tmp_path / "cut", stop_after_step=3)
    tune(chat(), tmp_path / "cut")
    assert stored(tmp_path / "whole" / LAST) == stored(tmp_path / "cut" / LAST)
    assert curve(tmp_path / "whole") == curve(tmp_path / "cut")


@pytest.mark.parametrize("reader", ["every-rank", "rank-0"])
def test_two_ranks_train_the_batches_of_one(chat: Chat, tmp_path: Path, reader: str) -> None:
    tune(chat(), tmp_path / "one")
    two = {"parallel.nproc": "2", "parallel.timeout": "60s", "data.reader": json.dumps(reader)}
    tune(chat(**two), tmp_path / "two")
    states = [json.loads((tmp_path / name / LAST / "state.json").read_text()) for name in ("one", "two")]
    assert states[0]["data"] == states[1]["data"]
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_chains_of_thought_keep_only_answers_that_think_and_end(chat: Chat, tmp_path: Path) -> None:
    rows = conversations(40, think=True)
    rows[3]["messages"][1]["content"] = "no thought"
    rows[5]["messages"][1]["content"] = "<think>never closed"
    source = write(tmp_path / "thoughts.jsonl", rows)
    with pytest.raises(InputError, match=r"(?s)max_drop_fraction"):
        tune(chat("nano-3.0-cot-sft", source, **{"chat.max_drop_fraction": "0.01"}), tmp_path / "strict")
    assert tune(chat("nano-3.0-cot-sft", source), tmp_path / "run").outcome.complete


def test_the_same_questions_are_answered_before_during_and_after(chat: Chat, base: Path, tmp_path: Path) -> None:
    recipe = chat(**{"chat.probes": "3", "checkpoint.sample_prompt": '"What is 3 + 4?"', "eval.every_steps": "6"})
    tune(recipe, tmp_path / "run")
    metrics = read_metrics(tmp_path / "run")
    records = metrics.of("probes")
    assert [record["step"] for record in records] == [0, 3, 6]
    questions = [[probe["question"] for probe in record["probes"]] for record in records]
    assert questions[0] == questions[1] == questions[2]
    assert questions[0][:2] == ["What is 3 + 4?", QUESTIONS[0]]
    assert all(asked.startswith("What is") for asked in questions[0][-3:])  # held-out ones
    assert len(questions[0]) == 1 + 8 + 3
    assert [record["step"] for record in metrics.of("held_out")] == [0, 6]
    own = evaluate(tmp_path / "run", ["probes"], tokens=4)["tasks"]["probes"]["greedy"]["probes"]
    assert [probe["answer"] for probe in own] == [probe["answer"] for probe in records[-1]["probes"][1:9]]
    untrained = evaluate(base, ["probes"], tokens=4)["tasks"]["probes"]["greedy"]["probes"]
    assert [probe["answer"] for probe in untrained] == [probe["answer"] for probe in records[0]["probes"][1:9]]
    assert "## Step 3" in (tmp_path / "run" / "samples.md").read_text()
    page = write_report([tmp_path / "run"]).read_text()
    assert "<th>step 0</th><th>step 3</th><th>step 6</th>" in page


def test_probes_that_are_no_longer_wanted_leave_no_record(chat: Chat, tmp_path: Path) -> None:
    quiet = {"checkpoint.sample_prompt": '""', "checkpoint.sample_tokens": "100", "train.steps": "2"}
    tune(chat(**quiet), tmp_path / "run")
    assert not read_metrics(tmp_path / "run").of("probes")
    tune(chat(**{"chat.probes": "0", "train.steps": "2"}), tmp_path / "none held out")
    assert all(len(record["probes"]) == 9 for record in read_metrics(tmp_path / "none held out").of("probes"))


def test_answers_that_cannot_fit_into_the_context_are_refused_before_the_first_step(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"checkpoint\.sample_tokens: 120 tokens"):
        tune(chat(**{"checkpoint.sample_tokens": "120"}), tmp_path / "run")


FLIPS = {
    "chat.template": '"plain"',
    "chat.loss_on": '"last"',
    "chat.history_reasoning": '"keep"',
    "chat.too_long": '"truncate"',
    "chat.hold_out": "0.4",
}


@pytest.mark.parametrize("key", FLIPS)
def test_another_value_of_a_chat_key_trains_something_else(key: str, chat: Chat, tmp_path: Path) -> None:
    thinks = [
        {"role": "user", "content": "Twice?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nNo."},
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nYes."},
    ]
    long = [{"role": "user", "content": "Long?"}, {"role": "assistant", "content": "Very. " * 200}]
    rows = [*conversations(30), {"messages": thinks}, {"messages": long}]
    source = write(tmp_path / "mixed.jsonl", rows)
    tune(chat(path=source), tmp_path / "before")
    tune(chat(path=source, **{key: FLIPS[key]}), tmp_path / "after")
    assert stored(tmp_path / "before" / LAST) != stored(tmp_path / "after" / LAST)


def test_a_cache_is_shared_by_runs_and_renders_nothing_twice(chat: Chat, tmp_path: Path) -> None:
    cache = {"chat.cache": json.dumps(str(tmp_path / "cache"))}
    tune(chat(**cache), tmp_path / "one")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    tune(chat(**cache, **{"optim.lr": "1e-4"}), tmp_path / "two")
    rendered = {path: time for path, time in files.items() if path.name != ".lock"}
    assert len(rendered) > 1
    assert {path: path.stat().st_mtime_ns for path in rendered} == rendered


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{broken", "bad.jsonl:1"),
        (json.dumps({"messages": [{"role": "assistant", "content": "first"}]}), "bad.jsonl:1"),
        (json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}), "empty"),
    ],
)
def test_a_file_without_a_usable_row_is_told_with_file_and_line(
    line: str, told: str, chat: Chat, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(line + "\n")
    with pytest.raises(InputError, match=told):
        tune(chat(path=bad), tmp_path / "run")
