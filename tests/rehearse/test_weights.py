"""Small weights in the place of given ones; an export of which no answer would end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from argonne.errors import InputError
from argonne.layout import FINAL_MODEL, GENERATION_CONFIG
from argonne.model.load import load_model
from argonne.plan.shape import weights_on_disk
from argonne.recipe import load_recipe
from argonne.rehearse.shrink import shrink
from argonne.rehearse.weights import small_weights
from argonne.tokens.tokenizer import load_tokenizer


def test_small_weights_have_the_kind_the_tokenizer_and_the_turn_ends_of_the_given_ones(
    base: Path, tmp_path: Path
) -> None:
    start = shutil.copytree(base / FINAL_MODEL, tmp_path / "start")
    settings = start / GENERATION_CONFIG
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": [0, 3]}))
    stored = weights_on_disk(str(start)) or {}
    fields = {f"model.{name}": json.dumps(value) for name, value in stored.items() if value}
    model = shrink(load_recipe("nano-3.0", {**fields, "model.num_key_value_heads": "2"})).recipe.model
    small_weights(str(start), model, tmp_path / "small")
    found, given = load_model(tmp_path / "small"), load_model(start)
    assert found.model.config.hidden_size == model.hidden_size
    assert found.model.config.num_key_value_heads == 2
    assert found.model.config.vocab_size == given.model.config.vocab_size
    assert load_tokenizer(tmp_path / "small").fingerprint == load_tokenizer(start).fingerprint
    assert json.loads((tmp_path / "small" / GENERATION_CONFIG).read_text())["eos_token_id"] == [0, 3]


def test_small_weights_are_the_same_each_time(base: Path, tmp_path: Path) -> None:
    model = shrink(load_recipe("nano-3.0", {"model.vocab_size": "512"})).recipe.model
    for name in "ab":
        small_weights(str(base), model, tmp_path / name)
    one, other = (load_model(tmp_path / name).model.state_dict() for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_small_weights_of_a_folder_without_a_model_are_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        small_weights(str(tmp_path / "nowhere"), load_recipe("nano-3.0").model, tmp_path / "small")
