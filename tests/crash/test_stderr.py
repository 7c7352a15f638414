"""Where nobody reads what a run says, or nothing can be written any more, the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.recipe import to_toml
from argonne.train.checkpoint import LAST
from tests.crash.conftest import Mother
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
Finish = Callable[..., None]


@pytest.mark.parametrize(
    ("stderr", "ranks"), [("full", 1), ("without a reader", 1), ("closed", 1), ("without a reader", 2)]
)
def test_a_run_outlives_its_stderr(
    mother: Mother, finish: Finish, nano: Nano, tmp_path: Path, stderr: str, ranks: int
) -> None:
    recipe = nano(**{"parallel.nproc": str(ranks)})
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    run = tmp_path / "run"
    log = tmp_path / "log"
    mother.command(["pretrain", str(tmp_path / "recipe.toml"), "--run", str(run)], log, stderr=stderr)
    assert mother.wait() == [0], log.read_text()
    finish(recipe, tmp_path / "whole", ranks=ranks)
    assert curve(run) == curve(tmp_path / "whole")
    assert stored(run / LAST) == stored(tmp_path / "whole" / LAST)
