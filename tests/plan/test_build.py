"""The plan of a recipe, put together."""

from __future__ import annotations

from pathlib import Path

import pytest

from argonne.plan.build import make_plan
from argonne.recipe import load_recipe, recipe_names, to_toml


@pytest.mark.parametrize("name", recipe_names())
def test_a_packaged_recipe_and_what_a_run_saves_of_it_plan_alike(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "config.toml").write_text(to_toml(recipe))
    saved = make_plan(load_recipe(str(tmp_path / "config.toml")), name=name)
    assert saved == make_plan(recipe, name=name)
