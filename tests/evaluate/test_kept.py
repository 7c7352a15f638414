"""Measurements that are killed and go on, alone and shared among processes, and what they leave."""

from __future__ import annotations

import csv
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from argonne import cli
from argonne.errors import InputError, Stopped
from argonne.evaluate.ranks import share_out
from argonne.evaluate.run import evaluate
from argonne.files import read_json
from argonne.model.stored import fingerprint_of_weights
from tests.evaluate.conftest import Make


def test_a_killed_measurement_goes_on_to_the_same_table(
    folder: Path, mmlu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argonne.evaluate.scorer.TOKENS_A_BATCH", 1)
    whole = evaluate(folder, ["mmlu"], mmlu, device="cpu", out=tmp_path / "whole")
    file = tmp_path / "whole" / "mmlu.answers.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / file.name).write_bytes(b"".join(lines[:7]) + lines[7][:20])
    again = evaluate(folder, ["mmlu"], mmlu, device="cpu", out=tmp_path / "cut")
    assert again == whole
    assert (tmp_path / "cut" / "mmlu.jsonl").read_text() == (tmp_path / "whole" / "mmlu.jsonl").read_text()
    assert sorted((tmp_path / "cut" / file.name).read_bytes().splitlines()) == sorted(file.read_bytes().splitlines())


def test_answers_of_another_model_are_not_taken(folder: Path, make_folder: Make, mmlu: Path, tmp_path: Path) -> None:
    evaluate(folder, ["mmlu"], mmlu, device="cpu", out=tmp_path / "out")
    with pytest.raises(InputError, match="another model or other questions"):
        evaluate(make_folder(512), ["mmlu"], mmlu, 1, device="cpu", out=tmp_path / "out")


def test_written_answers_go_on_to_the_same_table_too(folder: Path, word_problems: Path, tmp_path: Path) -> None:
    how = {"tokens": 6, "samples": 2, "device": "cpu"}
    whole = evaluate(folder, ["gsm8k", "gsm8k_base"], word_problems, out=tmp_path / "whole", **how)  # type: ignore[arg-type]
    for name, kept in (("gsm8k", 9), ("gsm8k_base", 4)):
        file = tmp_path / "whole" / f"{name}.answers.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        assert len(lines) == 1 + 3 * 11
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / file.name).write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
    again = evaluate(folder, ["gsm8k", "gsm8k_base"], word_problems, out=tmp_path / "cut", **how)  # type: ignore[arg-type]
    assert again == whole


def test_processes_that_share_the_questions_find_what_one_does(
    folder: Path, mmlu: Path, word_problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, how = ["mmlu", "gsm8k_base"], {"tokens": 6, "device": "cpu"}
    alone = evaluate(folder, asked, tmp_path, **how)  # type: ignore[arg-type]
    seen: list[tuple[int, int]] = []
    together = evaluate(folder, asked, tmp_path, nproc=2, out=tmp_path / "out", **how)  # type: ignore[arg-type]
    assert together == alone
    parts = [(tmp_path / "out" / f"gsm8k_base.answers{one}.jsonl").read_text().splitlines() for one in ("", ".1")]
    assert [*map(len, parts)] == [1 + 6, 1 + 5]
    (tmp_path / "out" / "mmlu.answers.jsonl").unlink()
    again = evaluate(folder, asked, tmp_path, out=tmp_path / "out", progress=lambda *at: seen.append(at), **how)  # type: ignore[arg-type]
    assert again == alone
    assert 0 < len(seen) <= 3 * 2


def test_a_process_that_finds_a_fault_tells_it_in_a_line(
    folder: Path, mmlu: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38  # finite, and what comes of it is not
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert cli.main(["eval", str(broken), "--tasks", "mmlu", "--data", str(mmlu), "--nproc", "2"]) == 2
    said = capfd.readouterr().err
    assert "log-probabilities are not finite" in said
    assert "Traceback" not in said


def test_the_numbers_lie_in_a_table_too(folder: Path, mmlu: Path, tmp_path: Path) -> None:
    values = evaluate(folder, ["mmlu"], mmlu, device="cpu", out=tmp_path / "out")["tasks"]["mmlu"]
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        rows = {(row["task"], row["group"], row["measure"]): row["value"] for row in csv.DictReader(file)}
    assert float(rows["mmlu", "", "accuracy"]) == values["accuracy"]
    assert int(rows["mmlu", "marketing", "questions"]) == 3
    assert float(rows["mmlu", "other", "standard_error"]) == values["together"]["other"]["standard_error"]


def test_results_name_the_weights_that_they_are_of(folder: Path, mmlu: Path, tmp_path: Path) -> None:
    evaluate(folder, ["mmlu"], mmlu, device="cpu", out=tmp_path / "out")
    written = read_json(tmp_path / "out" / "results.json")
    assert written["weights"] == fingerprint_of_weights(folder)
    assert written["int8"] is False


def ends_who_asked(asking: int) -> None:
    """Ask the command to stop, as a scheduler does, and never answer."""
    os.kill(asking, signal.SIGTERM)
    signal.pause()


def test_processes_that_are_asked_to_stop_end_and_the_way_to_go_on_is_told() -> None:
    with pytest.raises(Stopped, match="with --out the same command goes on"):
        share_out(ends_who_asked, (os.getpid(),), 2, [])
