"""A recipe's stage is trained by the stage of that name."""

from __future__ import annotations

import pytest

from argonne.config import CHAT_STAGES
from argonne.recipe import load_recipe, recipe_names
from argonne.stages.choice import stage_of
from argonne.stages.pretrain import PRETRAIN
from argonne.stages.sft import SFT


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_of_conversations_is_fine_tuned_and_any_other_pretrained(name: str) -> None:
    recipe = load_recipe(name, {})
    assert stage_of(recipe) is (SFT if recipe.stage in CHAT_STAGES else PRETRAIN)
