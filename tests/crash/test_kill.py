"""A run killed with `kill -9` at random moments and resumed each time is the run that was never
touched: bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.train.checkpoint import LAST
from tests.crash.conftest import Mother
from tests.crash.killing import kill_until_complete
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
Finish = Callable[..., None]
STEPS = 60


def recipe_of(nano: Nano, **overrides: str) -> Recipe:
    return nano(
        **{
            "train.steps": str(STEPS),
            "checkpoint.every_steps": "2",
            "checkpoint.sample_tokens": "2",
            "eval.windows": "2",
            **overrides,
        }
    )


def assert_untouched(killed: Path, whole: Path) -> None:
    """Step, tokens, loss, gradient norm and rate of each step, and every weight and moment, to the last bit."""
    assert [record["step"] for record in curve(killed)] == list(range(1, STEPS + 1))
    assert curve(killed) == curve(whole)
    assert stored(killed / LAST) == stored(whole / LAST)
    assert stored(killed / "final_model") == stored(whole / "final_model")


def test_five_kills_two_of_them_inside_a_save_leave_no_trace(
    mother: Mother, finish: Finish, nano: Nano, tmp_path: Path
) -> None:
    recipe = recipe_of(nano)
    finish(recipe, tmp_path / "whole")
    kills = kill_until_complete(mother, recipe, tmp_path / "killed", kills=5, inside_saves=2, seed=1)
    finish(recipe, tmp_path / "killed")
    assert kills.total >= 5
    assert kills.inside_saves >= 2
    assert_untouched(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.campaign
@pytest.mark.parametrize("background", [False, True], ids=["in place", "in the background"])
@pytest.mark.parametrize("ranks", [1, 2], ids=["1 rank", "2 ranks"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_campaign_of_fifty_kills_leaves_no_trace(
    mother: Mother, finish: Finish, nano: Nano, tmp_path: Path, ranks: int, optimizer: str, background: bool
) -> None:
    recipe = recipe_of(
        nano,
        **{
            "optim.name": optimizer,
            "model.hidden_dropout": "0.1",
            "data.order": "shuffled",
            "checkpoint.asynchronous": str(background).lower(),
        },
    )
    finish(recipe, tmp_path / "whole", ranks=ranks)
    kills = kill_until_complete(mother, recipe, tmp_path / "killed", kills=50, inside_saves=15, seed=ranks, ranks=ranks)
    finish(recipe, tmp_path / "killed", ranks=ranks)
    print(f"{kills.total} kills, {kills.inside_saves} inside a save, {kills.sessions} sessions")
    assert kills.total >= 50
    assert kills.inside_saves >= 15
    assert_untouched(tmp_path / "killed", tmp_path / "whole")
