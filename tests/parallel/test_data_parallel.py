"""Data parallelism over two local workers: the same batches, the same numbers, one decision for all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.stages.pretrain import run
from argonne.train.checkpoint import LAST
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
TWO = {"parallel.nproc": "2"}


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]], relative: float) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine["tokens"], mine["lr"]) == (theirs["tokens"], theirs["lr"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=relative)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_then_two_then_one_rank_gives_the_curve_of_one(nano: Nano, tmp_path: Path, optimizer: str) -> None:
    one, two = nano(**{"optim.name": optimizer}), nano(**{"optim.name": optimizer}, **TWO)
    run(one, tmp_path / "whole")
    run(one, tmp_path / "cut", stop_after_step=4)
    run(two, tmp_path / "cut", stop_after_step=8)
    run(one, tmp_path / "cut")
    assert_close(curve(tmp_path / "cut"), curve(tmp_path / "whole"), 1e-6)


def test_uneven_rows_and_documents_give_the_same_loss_on_two_ranks(nano: Nano, tmp_path: Path) -> None:
    uneven = {"batch.tokens_per_step": "224", "data.document_mask": "true", "train.steps": "4", "batch.micro": "3"}
    run(nano(**uneven), tmp_path / "one")
    run(nano(**uneven, **TWO), tmp_path / "two")
    assert_close(curve(tmp_path / "two"), curve(tmp_path / "one"), 1e-6)


def test_rank_0_reading_for_all_gives_the_same_curve(nano: Nano, tmp_path: Path) -> None:
    run(nano(**TWO, **{"train.steps": "5"}), tmp_path / "each")
    run(nano(**TWO, **{"train.steps": "5", "data.reader": "rank-0"}), tmp_path / "first")
    assert curve(tmp_path / "first") == curve(tmp_path / "each")


def test_two_ranks_stopped_and_resumed_equal_two_ranks_uninterrupted_bit_for_bit(nano: Nano, tmp_path: Path) -> None:
    recipe = nano(**TWO, **{"model.hidden_dropout": "0.1"})
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "cut", stop_after_step=5)
    run(recipe, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert stored(tmp_path / "cut" / LAST) == stored(tmp_path / "whole" / LAST)
    assert json.loads((tmp_path / "whole" / "manifest.json").read_text())["world_size"] == 2


def test_wrong_input_on_workers_is_wrong_input_and_not_a_crash(nano: Nano, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="warmup"):
        run(nano(**TWO, **{"schedule.warmup": "99"}), tmp_path / "run")


@pytest.mark.parametrize("reader", ["every-rank", "rank-0"])
def test_a_shard_that_is_found_damaged_by_one_rank_ends_all_and_nothing_is_started_again(
    nano: Nano, tokens: Path, tmp_path: Path, reader: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tokens, tmp_path / "set")
    ids = np.memmap(tmp_path / "set" / "tokens-00000.bin", np.uint16, "r+", offset=1024)
    ids[5 * 256 + 200] = 60_000  # in a row of the second rank at step 5
    recipe = nano(
        **TWO,
        **{
            "data.reader": f'"{reader}"',
            "data.sources": f'[{{ path = "{tmp_path / "set"}", max_epochs = 9 }}]',
            "data.verify": "off",
            "data.order": "sequential",
        },
    )
    with pytest.raises(InputError, match=r"holds id 60,000, .*it is token 1,480 of the file"):
        run(recipe, tmp_path / "run")
    assert [row["step"] for row in curve(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert "all start again" not in capfd.readouterr().err
