"""A run that was stopped and resumed is the run that was not: bit for bit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.files import TEMPORARY
from argonne.stages.pretrain import run
from argonne.train.checkpoint import LAST
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"optim.name": "muon"},
        {"train.precision": "bf16"},
        {"data.order": "shuffled", "data.document_mask": "true"},
        {"model.hidden_dropout": "0.1", "model.attention_dropout": "0.1"},
        {"batch.steps": "[{ step = 5, tokens_per_step = 512 }, { step = 9, sequence_length = 64 }]"},
    ],
    ids=["adamw", "muon", "bf16", "shuffled documents", "dropout", "changes of batch and length"],
)
def test_stopped_at_three_random_steps_and_resumed_equals_uninterrupted(
    nano: Nano, tmp_path: Path, overrides: dict[str, str]
) -> None:
    recipe = nano(**overrides)
    run(recipe, tmp_path / "whole")
    stops = sorted(random.Random(str(overrides)).sample(range(1, 12), 3))
    for stop in stops:
        result = run(recipe, tmp_path / "cut", stop_after_step=stop)
        assert (result.outcome.step, result.outcome.complete) == (stop, False)
    assert run(recipe, tmp_path / "cut").outcome.complete
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) == 12
    assert stored(tmp_path / "cut" / LAST) == stored(tmp_path / "whole" / LAST)


def test_other_seeds_give_other_weights_and_the_same_seed_the_same(nano: Nano, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(nano(seed=seed, **{"train.steps": "4"}), tmp_path / name)
    assert stored(tmp_path / "a" / LAST) == stored(tmp_path / "b" / LAST)
    assert stored(tmp_path / "a" / LAST) != stored(tmp_path / "c" / LAST)


def test_evaluation_and_sampling_leave_order_and_randomness_untouched(nano: Nano, tmp_path: Path) -> None:
    dropout = {"model.hidden_dropout": "0.1"}
    run(nano(**dropout), tmp_path / "busy")
    run(
        nano(**dropout, **{"eval.windows": "0", "checkpoint.sample_prompt": "", "checkpoint.every_steps": "0"}),
        tmp_path / "quiet",
    )
    assert curve(tmp_path / "busy") == curve(tmp_path / "quiet")


def test_a_damaged_newest_checkpoint_is_passed_over_by_name(
    nano: Nano, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = nano()
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "cut", stop_after_step=8)
    victim = next((tmp_path / "cut" / "checkpoint_step_8").glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(bytes(data))
    run(recipe, tmp_path / "cut")
    assert "passing over" in (said := capfd.readouterr().err)
    assert "checkpoint_step_8" in said
    assert "resuming" in said
    assert stored(tmp_path / "cut" / LAST) == stored(tmp_path / "whole" / LAST)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_not_started_afresh(nano: Nano, tmp_path: Path) -> None:
    recipe = nano(**{"checkpoint.keep_last": "1"})
    run(recipe, tmp_path / "cut", stop_after_step=4)
    (tmp_path / "cut" / "checkpoint_step_4" / "state.json").unlink()
    with pytest.raises(InputError, match="none of its checkpoints is complete"):
        run(recipe, tmp_path / "cut")


def test_a_changed_key_is_refused_by_name_and_allowed_by_name(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "cut", stop_after_step=4)
    changed = nano(**{"optim.lr": "1e-3"})
    with pytest.raises(InputError, match=r"optim\.lr"):
        run(changed, tmp_path / "cut")
    run(changed, tmp_path / "cut", allow=["optim.lr"])
    assert {record["lr"] for record in curve(tmp_path / "cut")[4:8]} == {1e-3}


def test_keys_that_change_no_weight_may_differ(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "whole")
    run(nano(), tmp_path / "cut", stop_after_step=4)
    run(nano(**{"log.every_steps": "3", "checkpoint.keep_last": "5"}), tmp_path / "cut")
    assert stored(tmp_path / "cut" / LAST) == stored(tmp_path / "whole" / LAST)


def test_resume_from_starts_a_new_run_with_the_whole_state_and_its_lineage(nano: Nano, tmp_path: Path) -> None:
    recipe = nano()
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "first", stop_after_step=5)
    run(recipe, tmp_path / "second", resume_from=tmp_path / "first" / "checkpoint_step_5")
    assert stored(tmp_path / "second" / LAST) == stored(tmp_path / "whole" / LAST)
    parent = json.loads((tmp_path / "second" / "manifest.json").read_text())["parent"]
    first = json.loads((tmp_path / "first" / "manifest.json").read_text())
    assert parent == {"run_id": first["run_id"], "checkpoint": "checkpoint_step_5", "step": 5}


def test_continue_takes_weights_and_starts_its_own_schedule(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "first")
    recipe = nano(**{"model.init_from": json.dumps(str(tmp_path / "first")), "train.steps": "6", "optim.lr": "1e-4"})
    run(recipe, tmp_path / "second")
    assert curve(tmp_path / "second")[0]["lr"] == pytest.approx(1e-4 / 3)
    assert curve(tmp_path / "second")[0]["loss"] < curve(tmp_path / "first")[0]["loss"] - 0.1


def test_leftovers_of_a_killed_save_are_collected_at_the_start(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "cut", stop_after_step=4)
    (tmp_path / "cut" / f"{TEMPORARY}checkpoint_step_9").mkdir()
    run(nano(), tmp_path / "cut")
    assert list((tmp_path / "cut").glob(f"{TEMPORARY}*")) == []
