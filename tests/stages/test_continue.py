"""`continue`: weights of one run, a schedule and step count of its own, and data read on from where
the parent stood.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.config import Recipe
from argonne.data.dataset import open_training_data
from argonne.data.loader import Loader
from argonne.layout import FINAL_MODEL
from argonne.model.load import tokens_before
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.report.inspect import inspect_path
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from argonne.stages.start import carried_data
from argonne.train.checkpoint import LAST, read_state
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]


def rows(recipe: Recipe, step: int, state: dict[str, Any] | None = None) -> torch.Tensor:
    data = open_training_data(recipe.data, recipe.batch, recipe.seed, state=state)
    with Loader(data, 0, 1, 8, prefetch=0) as loader:
        return torch.cat([micro["input_ids"] for micro in loader.batch(step).micro_batches])


def carried(recipe: Recipe, step: int, into: Recipe) -> dict[str, Any]:
    return carried_data(open_training_data(recipe.data, recipe.batch, recipe.seed).state(step), into)


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_the_first_rows_are_those_the_parent_would_have_read_next(nano: Nano, order: str) -> None:
    recipe = nano(**{"data.order": order})
    state = carried(recipe, 6, recipe)
    assert [rows(recipe, step, state).tolist() for step in range(3)] == [
        rows(recipe, step).tolist() for step in range(6, 9)
    ]
    continued = open_training_data(recipe.data, recipe.batch, recipe.seed, state=state)
    assert (continued.samples_before(0), continued.tokens_before(2)) == (0, 2 * 256)


def test_another_order_begins_with_the_next_epoch(nano: Nano) -> None:
    parent, child = nano(), nano(**{"data.order": "shuffled"})
    state = carried(parent, 6, child)
    assert {place["epoch"] for place in state["positions"].values()} == {1}
    assert rows(child, 0, state).tolist() != rows(child, 0).tolist()


def test_a_continued_run_stopped_and_resumed_equals_one_that_was_not(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "parent", stop_after_step=5)
    recipe = nano(
        **{"model.init_from": json.dumps(str(tmp_path / "parent")), "train.steps": "8", "data.order": "shuffled"}
    )
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "cut", stop_after_step=3)
    run(recipe, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) == 8
    assert stored(tmp_path / "cut" / LAST) == stored(tmp_path / "whole" / LAST)


def test_other_data_of_the_same_tokenizer_is_read_from_its_beginning(nano: Nano, tokens: Path, tmp_path: Path) -> None:
    text = tmp_path / "more.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    more = prepare(PrepareOptions(input=(str(text),), out=tmp_path / "more", tokenizer=tokens / "tokenizer", workers=1))
    run(nano(**{"train.steps": "4"}), tmp_path / "parent")
    source = f"[{{ path = {json.dumps(str(more))} }}]"
    changes = {"train.steps": "4", "data.sources": source, "eval.every_steps": "0"}
    recipe = nano(**{"model.init_from": json.dumps(str(tmp_path / "parent")), **changes})
    assert run(recipe, tmp_path / "child").outcome.complete
    assert len(read_metrics(tmp_path / "child").of("step")) == 4
    assert read_state(tmp_path / "child" / LAST)["samples"] == 4 * 8
    state = carried_data(read_state(tmp_path / "parent" / LAST)["data"], recipe)
    assert rows(recipe, 0, state).tolist() == rows(recipe, 0).tolist()


def tokens_of(folder: Path) -> tuple[int, int | None]:
    state = read_state(folder / LAST)
    return state["tokens"], state["tokens_before"]


def test_the_tokens_of_all_ancestors_are_known_to_a_run_from_weights(
    nano: Nano, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A chain of three: 256 tokens a step."""
    run(nano(**{"train.steps": "6"}), tmp_path / "first", stop_after_step=5)
    for parent, child, steps in (("first", "second", 4), ("second", "third", 3)):
        source = {"model.init_from": json.dumps(str(tmp_path / parent)), "eval.every_steps": "0"}
        run(nano(**source, **{"train.steps": str(steps), "schedule.decay": "0"}), tmp_path / child)
    assert [tokens_of(tmp_path / name) for name in ("first", "second", "third")] == [
        (5 * 256, 0),
        (4 * 256, 5 * 256),
        (3 * 256, 9 * 256),
    ]
    assert "(2,304 tokens), with a schedule of its own" in capsys.readouterr().err
    facts = inspect_path(tmp_path / "third")
    assert facts["manifest"]["tokens_before"] == 9 * 256
    assert inspect_path(tmp_path / "third" / LAST)["tokens_before"] == 9 * 256


def test_a_whole_state_goes_on_with_the_counts_and_keeps_what_came_before(nano: Nano, tmp_path: Path) -> None:
    run(nano(**{"train.steps": "4"}), tmp_path / "first")
    recipe = nano(**{"model.init_from": json.dumps(str(tmp_path / "first")), "train.steps": "8"})
    run(recipe, tmp_path / "second", stop_after_step=3)
    run(recipe, tmp_path / "third", resume_from=tmp_path / "second" / LAST, stop_after_step=5)
    run(recipe, tmp_path / "third")
    assert tokens_of(tmp_path / "third") == (8 * 256, 4 * 256)
    assert [record["tokens"] for record in read_metrics(tmp_path / "third").of("step")] == [
        256 * step for step in range(4, 9)
    ]


def test_weights_that_do_not_say_what_they_were_trained_on_leave_the_count_open(nano: Nano, tmp_path: Path) -> None:
    run(nano(**{"train.steps": "4"}), tmp_path / "first")
    exported = (tmp_path / "first" / FINAL_MODEL).rename(tmp_path / "exported")
    child = nano(**{"model.init_from": json.dumps(str(exported)), "train.steps": "4"})
    run(child, tmp_path / "second")
    assert tokens_of(tmp_path / "second") == (4 * 256, None)
    assert tokens_before({"tokens": 7, "parent": {"model": "earlier"}}) is None
    assert tokens_before({"tokens": 7, "parent": None}) == 0
