"""The stage that a recipe names."""

from __future__ import annotations

import pytest

from argonne.recipe import load_recipe, recipe_names
from argonne.stages.dpo import DPO
from argonne.stages.pretrain import PRETRAIN, stage_of
from argonne.stages.sft import SFT

OF_CONVERSATIONS = {"sft": SFT, "cot-sft": SFT, "dpo": DPO}


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_is_trained_by_the_stage_that_it_names(name: str) -> None:
    recipe = load_recipe(name, {})
    assert stage_of(recipe) is OF_CONVERSATIONS.get(recipe.stage, PRETRAIN)
