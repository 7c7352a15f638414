"""Tensors of a folder: what is damaged, cut or not finite is one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.layout import FINAL_MODEL
from argonne.model.stored import DTYPES, StoredTensors
from argonne.stages.pretrain import run
from tests.prepare.helpers import refusal


def test_every_type_and_shape_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = StoredTensors(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(stored.read(name), tensor)
        assert stored.read(name).dtype == tensor.dtype


def test_a_file_that_is_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4096)}, tmp_path / "model.safetensors")
    stored = StoredTensors(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(InputError, match=r"model.safetensors: a has \d+ bytes, expected 16,384; the file is truncated"):
        stored.read("a")


@pytest.fixture
def broken(base: Path, tmp_path: Path) -> Path:
    """A model one of whose weights is not a number."""
    shutil.copytree(base / FINAL_MODEL, tmp_path / "broken")
    tensors = load_file(tmp_path / "broken/model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, tmp_path / "broken/model.safetensors", {"format": "pt"})
    return tmp_path / "broken"


SAID = "broken/model.safetensors: model.norm.weight holds NaN or infinity in 1 of 32 places"


@pytest.mark.parametrize("verb", ["generate", "export"])
def test_weights_that_are_not_finite_are_refused_before_any_work(
    verb: str, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"generate": ["--prompt", "a"], "export": ["--as", "native", "--out", str(tmp_path / "out")]}
    assert SAID in refusal([verb, str(broken), *flags[verb]], capsys)


def test_no_training_starts_from_weights_that_are_not_finite(
    broken: Path, nano: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = nano(**{"model.init_from": json.dumps(str(broken))})
    with pytest.raises(InputError, match=SAID):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint_last").exists()
