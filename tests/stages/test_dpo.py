"""dpo through the loop: what a row holds, the reference's scores, exact resume, what can be learned, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from argonne.cli.command import main
from argonne.config import Recipe
from argonne.data.pair_data import PairData
from argonne.errors import InputError
from argonne.layout import CONVERSATIONS
from argonne.model.load import load_model
from argonne.report.records import read_metrics
from argonne.report.report import write_report
from argonne.stages import dpo
from argonne.stages.dpo import DPO
from argonne.stages.pretrain import RunResult, run
from argonne.train.checkpoint import LAST
from tests.train.helpers import curve, stored
from tests.tuning import pairs as made
from tests.tuning import write

Chat = Callable[..., Recipe]
Pairs = Callable[..., Recipe]


@pytest.fixture
def pairs(chat: Chat, tmp_path: Path) -> Pairs:
    """Makes recipes of small preference runs on 60 pairs."""
    source = write(tmp_path / "pairs.jsonl", made(60))

    def make(path: Path = source, **overrides: str) -> Recipe:
        return chat("nano-3.0-dpo", path, **{"dpo.chosen_weight": "0.0", **overrides})

    return make


def tune(recipe: Recipe, folder: Path, **how: Any) -> RunResult:
    return run(recipe, folder, stage=DPO, **how)


def reference_scores(model: Any, micro: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a model that is run beside the policy, from all its logits."""
    with torch.no_grad():
        logits = model(micro["input_ids"], position_ids=micro["position_ids"], use_cache=False).logits
    labels = micro["shift_labels"]
    log_p = torch.log_softmax(logits, -1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    found = torch.zeros_like(micro["reference"])
    for row in range(len(labels)):
        for number in range(int(micro["pairs"][row])):
            for side in (0, 1):
                mine = (micro["answer"][row] == 2 * number + side) & (labels[row] >= 0)
                found[row, number, side] = log_p[row][mine].sum()
    return found


def opened(recipe: Recipe, folder: Path) -> PairData:
    folder.mkdir(exist_ok=True)
    data = dpo.pairs(recipe, None, folder, frozenset())
    assert isinstance(data, PairData)
    return data


def test_a_row_holds_whole_pairs_chosen_first_each_conversation_from_its_own_start(
    pairs: Pairs, tmp_path: Path
) -> None:
    data = opened(pairs(), tmp_path / "run")
    arrays = {name: array.values for name, array in data.read(0, 0, 4, 5).items()}
    assert arrays["pairs"][4] == 0
    for row in range(4):
        labels, answer, positions = (arrays[name][row] for name in ("shift_labels", "answer", "position_ids"))
        begins = [*np.flatnonzero(positions == 0).tolist(), len(positions)]
        for number in range(2 * int(arrays["pairs"][row])):
            part = slice(begins[number], begins[number + 1])
            assert set(answer[part][labels[part] >= 0]) == {number}
            text = data.tokenizer.decode(labels[part][labels[part] >= 0])
            assert text.startswith("The answer is") == bool(number % 2)
            assert text.endswith("<|im_end|>")


def test_every_pair_of_an_epoch_is_counted_once(pairs: Pairs, tmp_path: Path) -> None:
    data = opened(pairs(), tmp_path / "run")
    steps = data.tokens_per_epoch // 512 + 1
    counted = sum(int(data.read(step, 0, 4, 4)["pairs"].values.sum()) for step in range(steps - 1))
    held = sum(int(batch["pairs"].sum()) for batch in data.held_out(99, 4))
    assert 0 < held < 60
    assert counted <= (60 - held) * 2
    assert data.rendered[0].account.used == 60


def test_cached_scores_of_the_reference_are_those_of_a_live_one(pairs: Pairs, base: Path, tmp_path: Path) -> None:
    recipe = pairs()
    tune(recipe, tmp_path / "run", stop_after_step=2)
    data = opened(recipe, tmp_path / "run")
    place = next((tmp_path / "run" / CONVERSATIONS).glob("references/[0-9a-f]*"))
    data.known = {side: [np.load(place / f"{side}-0.npy")] for side in ("train", "held_out")}
    reference = load_model(base).model
    for step in range(3):
        micro = {name: torch.from_numpy(array.values) for name, array in data.read(step, 0, 4, 4).items()}
        live = reference_scores(reference, micro)
        torch.testing.assert_close(micro["reference"], live, rtol=1e-5, atol=1e-4)


def test_the_loss_begins_at_log_two_and_a_style_is_learned(pairs: Pairs, tmp_path: Path) -> None:
    tune(
        pairs(**{"train.steps": "30", "eval.windows": "9", "eval.every_steps": "30", "optim.lr": "3e-3"}),
        tmp_path / "run",
    )
    held_out = read_metrics(tmp_path / "run").of("held_out")
    assert held_out[0]["step"] == 0
    assert held_out[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert held_out[-1]["metrics"]["accuracy"] == 1.0
    margins = [record["metrics"]["margin"] for record in read_metrics(tmp_path / "run").of("step")]
    assert margins[-1] > margins[10] > margins[0]
    assert "Accuracy" in write_report([tmp_path / "run"]).read_text()


def test_a_preference_run_that_was_stopped_is_the_one_that_was_not(pairs: Pairs, tmp_path: Path) -> None:
    tune(pairs(), tmp_path / "whole")
    tune(pairs(), tmp_path / "cut", stop_after_step=3)
    tune(pairs(), tmp_path / "cut")
    assert stored(tmp_path / "whole" / LAST) == stored(tmp_path / "cut" / LAST)
    assert curve(tmp_path / "whole") == curve(tmp_path / "cut")


def test_two_ranks_train_the_pairs_of_one(pairs: Pairs, tmp_path: Path) -> None:
    tune(pairs(), tmp_path / "one")
    tune(pairs(**{"parallel.nproc": "2", "parallel.timeout": "60s"}), tmp_path / "two")
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_a_run_whose_scores_are_gone_says_so_instead_of_scoring_itself(pairs: Pairs, tmp_path: Path) -> None:
    import shutil

    tune(pairs(), tmp_path / "run", stop_after_step=3)
    shutil.rmtree(next((tmp_path / "run" / CONVERSATIONS).glob("references/[0-9a-f]*")))
    with pytest.raises(InputError, match="are gone"):
        tune(pairs(), tmp_path / "run")


def test_a_run_goes_on_against_its_own_reference_when_other_weights_lie_there(
    pairs: Pairs, base: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(base, tmp_path / "start", symlinks=True)
    start = {"model.init_from": json.dumps(str(tmp_path / "start"))}
    tune(pairs(**start), tmp_path / "whole")
    tune(pairs(**start), tmp_path / "cut", stop_after_step=3)
    shutil.rmtree(tmp_path / "start")
    shutil.copytree(tmp_path / "whole", tmp_path / "start", symlinks=True)
    tune(pairs(**start), tmp_path / "cut")
    assert stored(tmp_path / "whole" / LAST) == stored(tmp_path / "cut" / LAST)


def test_a_loss_that_does_not_leave_its_start_is_told_once(
    pairs: Pairs, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(pairs(**{"train.steps": "24", "optim.lr": "1e-9", "dpo.scores": '"mean"'}), tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("has not left its start") == 1
    assert f"layers, from {base}\n" in said
    assert 'dpo.scores = "sum"' in said


FLIPS = {
    "dpo.loss": ('"ipo"', {}),
    "dpo.beta": ("0.5", {}),
    "dpo.smoothing": ("0.2", {}),
    "dpo.scores": ('"mean"', {}),
    "dpo.chosen_weight": ("0.7", {}),
}


@pytest.mark.parametrize("key", FLIPS)
def test_another_value_of_a_key_trains_something_else(key: str, pairs: Pairs, tmp_path: Path) -> None:
    value, under = FLIPS[key]
    tune(pairs(**under, **{"train.steps": "3"}), tmp_path / "before")
    tune(pairs(**{**under, "train.steps": "3", key: value}), tmp_path / "after")
    assert stored(tmp_path / "before" / LAST) != stored(tmp_path / "after" / LAST)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "Why?", "chosen": "a", "rejected": "a"}, "chosen-is-rejected 1 (bad.jsonl:1"),
        ({"prompt": "Why?", "chosen": "a " * 200, "rejected": "b"}, "too-long 1 (bad.jsonl:1"),
        ({"messages": []}, "unknown-shape 1 (bad.jsonl:1"),
    ],
)
def test_a_file_without_a_usable_pair_is_told_with_file_and_line(
    row: dict[str, Any], told: str, pairs: Pairs, tmp_path: Path
) -> None:
    import re

    bad = write(tmp_path / "bad.jsonl", [row])
    with pytest.raises(InputError, match=re.escape(told)):
        tune(pairs(bad), tmp_path / "run")


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_unusable_pairs_are_counted_by_reason_and_the_command_ends_with_2(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [said("user", "Who?"), said("assistant", "a")]
    rows = [
        {"prompt": "Why?", "chosen": "a", "rejected": "a"},
        *[{"prompt": "Why?", "chosen": "a " * 200, "rejected": "b"}] * 2,
        *[{"prompt": [said("user", "Why?")], "chosen": other, "rejected": "b"}] * 3,
    ]
    for name, kept in (("all.jsonl", []), ("most.jsonl", made(6))):
        bad = write(tmp_path / name, [*rows, *kept])
        more = ["--data.sequence_length", "128", "--batch.tokens_per_step", "512", "--data.sources", str(bad)]
        command = ["dpo", "nano-3.0-dpo", "--run", str(tmp_path / f"{name}-run"), "--init-from", str(base), *more]
        assert main(command) == 2
        told = capsys.readouterr().err
        for reason in ("chosen-is-rejected 1", "too-long 2", "prompt-does-not-match 3"):
            assert f"{reason} ({name}:" in told, told
    assert "0.1" in told  # half of them: above chat.max_drop_fraction


def test_a_key_that_does_nothing_is_refused(pairs: Pairs) -> None:
    with pytest.raises(InputError, match=r"dpo\.smoothing"):
        pairs(**{"dpo.loss": '"hinge"', "dpo.smoothing": "0.1"})
    with pytest.raises(InputError, match=r"train\.z_loss"):
        pairs(**{"train.z_loss": "0.1"})
