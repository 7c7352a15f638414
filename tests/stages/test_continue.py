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
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
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
