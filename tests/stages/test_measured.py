"""Tasks measured within a run: the numbers of `argonne eval`, told where a person looks, no trace in the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.cli.command import main
from argonne.config import Recipe
from argonne.errors import InputError
from argonne.evaluate import answers
from argonne.evaluate.run import evaluate
from argonne.recipe import to_toml
from argonne.report.records import read_metrics
from argonne.report.report import write_report
from argonne.stages import pretrain
from argonne.stages.pretrain import run
from argonne.stages.sft import SFT
from argonne.train.checkpoint import LAST
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
QUIET = {"checkpoint.sample_prompt": '""', "eval.windows": "0"}


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(5)))
    return file


def test_a_task_within_a_run_finds_what_eval_finds_on_the_checkpoint(
    chat: Nano, tokens: Path, problems: Path, tmp_path: Path
) -> None:
    asked = [f"gsm8k:{problems}", f"bpb:{tokens}", "sums"]
    more = {"eval.tasks": json.dumps(asked), "eval.task_limit": "4", "train.steps": "4", "checkpoint.every_steps": "4"}
    folder = tmp_path / "run"
    run(chat(**QUIET, **more, **{"chat.template": '"plain"', "chat.hold_out": "0"}), folder, stage=SFT)
    found = {(record["step"], record["task"]): record for record in read_metrics(folder).of("task")}
    assert list(found) == [(step, name) for step in (0, 4) for name in ("gsm8k", "bpb", "sums")]
    context = json.loads((folder / LAST / "config.json").read_text())["max_position_embeddings"]
    for name, data, limit in (("gsm8k", problems, 4), ("bpb", tokens, 4 * context), ("sums", None, 4)):
        there = evaluate(folder / LAST, [name], data, limit=limit, device="cpu")["tasks"][name]
        del there["items"]
        assert found[4, name]["values"] == there
    assert found[4, "bpb"]["metrics"] == {"bpb/bits_per_byte": found[4, "bpb"]["values"]["bits_per_byte"]}
    assert found[4, "bpb"]["metrics"] != found[0, "bpb"]["metrics"]


def test_a_base_model_is_asked_behind_examples_within_a_run_too(nano: Nano, tmp_path: Path) -> None:
    for name, count in (("test", 3), ("train", 6)):
        rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"eval.tasks": f'["gsm8k_base:{tmp_path}"]', "eval.task_limit": "2", "train.steps": "4"}
    run(nano(**QUIET, **more, **{"model.max_position_embeddings": "512"}), tmp_path / "run")
    found = read_metrics(tmp_path / "run").of("task")[-1]
    there = evaluate(tmp_path / "run" / LAST, ["gsm8k_base"], tmp_path, limit=2, device="cpu")["tasks"]["gsm8k_base"]
    del there["items"]
    assert found["values"] == there
    assert found["metrics"] == {"gsm8k_base/exact_match": there["exact_match"]}


def test_a_task_is_told_in_the_log_the_samples_and_the_report(
    nano: Nano, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(nano(**QUIET, **{"eval.tasks": '["bpb"]', "eval.task_limit": "3", "train.steps": "8"}), tmp_path / "run")
    assert capsys.readouterr().err.count("bpb: ") == 2
    assert (tmp_path / "run" / "samples.md").read_text().count("bpb: ") == 2
    page = write_report([tmp_path / "run"]).read_text()
    assert "task, at each checkpoint" in page
    assert "curve-0-task-metrics-bpb/bits_per_byte" in page


def test_tasks_leave_no_trace_in_the_training_and_a_resumed_run_is_the_one_that_was_not_stopped(
    nano: Nano, tmp_path: Path
) -> None:
    plain = {**QUIET, "model.max_position_embeddings": "128", "model.hidden_dropout": "0.1"}
    asked = {**plain, "eval.tasks": '["sums"]', "eval.task_limit": "2"}
    run(nano(**plain), tmp_path / "without")
    run(nano(**asked), tmp_path / "whole")
    run(nano(**asked), tmp_path / "cut", stop_after_step=5)
    run(nano(**asked), tmp_path / "cut")
    assert curve(tmp_path / "without") == curve(tmp_path / "whole") == curve(tmp_path / "cut")
    assert stored(tmp_path / "without" / LAST) == stored(tmp_path / "whole" / LAST) == stored(tmp_path / "cut" / LAST)
    whole, cut = (
        {record["step"]: record["values"] for record in read_metrics(tmp_path / name).of("task")}
        for name in ("whole", "cut")
    )
    assert whole == {step: values for step, values in cut.items() if step in whole}


def test_a_task_that_fails_is_told_and_the_others_are_measured(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(answers, "decoder_for", broken)
    more = {"eval.tasks": '["sums", "bpb"]', "eval.task_limit": "2", "model.max_position_embeddings": "128"}
    outcome = run(nano(**QUIET, **more), tmp_path / "run").outcome
    assert outcome.complete
    metrics = read_metrics(tmp_path / "run")
    assert {record["task"] for record in metrics.of("task")} == {"bpb"}
    assert "sums failed: ValueError: planted" in metrics.of("warning")[0]["message"]


BAD = {
    "sumz": "did you mean 'sums'?",
    "probes": "no number to follow",
    "gsm8k": "no data given",
    "gsm8k:nowhere.jsonl": "nowhere.jsonl: no such file",
    "bpb:nowhere*.txt": "matches no file",
    "sums:some.jsonl": "would not be read",
}


@pytest.mark.parametrize("entry", BAD)
def test_a_task_that_cannot_be_measured_is_refused_before_anything_is_built(
    entry: str, nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain, "next_token", None)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(nano(**{"eval.tasks": json.dumps([entry])})))
    assert main(["pretrain", str(recipe), "--run", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert f"eval.tasks, '{entry}': " in told
    assert BAD[entry] in told
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_task_named_twice_is_refused(nano: Nano, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="named twice"):
        run(nano(**{"eval.tasks": '["bpb", "bpb"]'}), tmp_path / "run")
