"""A run that is asked to stop at random moments, by any request to any of its processes, and resumed each time, is the
run that was never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.recipe import to_toml
from argonne.train.checkpoint import LAST
from tests.crash.conftest import Mother
from tests.crash.killing import Watcher
from tests.crash.signals import gone, stop_until_complete
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
Finish = Callable[..., None]
GRACE = 30


def _campaign(mother: Mother, finish: Finish, nano: Nano, folder: Path, *, signals: int, seed: int, ranks: int) -> None:
    steps = 12 * signals  # sessions that end late train on meanwhile
    recipe = nano(
        **{
            "parallel.nproc": str(ranks),
            "train.steps": str(steps),
            **({"stop.grace": f"{GRACE}s"} if ranks > 1 else {}),
            "checkpoint.every_steps": "4",
            "checkpoint.sample_tokens": "24",
            "eval.every_steps": "3",
            "eval.windows": "16",
        }
    )
    finish(recipe, folder / "whole", ranks=ranks)
    done = stop_until_complete(
        mother, recipe, folder / "stopped", signals=signals, seed=seed, ranks=ranks, file=folder / "stops.toml"
    )
    print(f"{ranks} ranks: {dict(done.codes)}, longest {done.longest:.1f} s")
    assert done.longest < GRACE
    finish(recipe, folder / "stopped", ranks=ranks)
    assert [record["step"] for record in curve(folder / "stopped")] == list(range(1, steps + 1))
    assert curve(folder / "stopped") == curve(folder / "whole")
    assert stored(folder / "stopped" / LAST) == stored(folder / "whole" / LAST)


@pytest.mark.parametrize(("ranks", "signals"), [(1, 6), (2, 3)], ids=["1 rank", "2 ranks"])
def test_requests_at_random_moments_leave_no_trace(
    mother: Mother, finish: Finish, nano: Nano, tmp_path: Path, ranks: int, signals: int
) -> None:
    _campaign(mother, finish, nano, tmp_path, signals=signals, seed=ranks, ranks=ranks)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ranks", "signals"), [(1, 30), (2, 20)], ids=["1 rank", "2 ranks"])
def test_two_hundred_requests_at_random_moments_leave_no_trace(
    mother: Mother, finish: Finish, nano: Nano, tmp_path: Path, ranks: int, signals: int, seed: int
) -> None:
    _campaign(mother, finish, nano, tmp_path, signals=signals, seed=100 + seed, ranks=ranks)


def test_workers_do_not_outlive_a_launcher_that_is_killed(mother: Mother, nano: Nano, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(to_toml(nano(**{"parallel.nproc": "2", "train.steps": "4000"})))
    run = tmp_path / "run"
    pid = mother.command(["pretrain", str(tmp_path / "recipe.toml"), "--run", str(run)], tmp_path / "log")
    assert Watcher(run, [pid]).wait_for_step(3), (tmp_path / "log").read_text()
    mother.kill()
    assert gone(pid)
