"""Which stage a recipe trains."""

from __future__ import annotations

from argonne.config import CHAT_STAGES, Recipe
from argonne.stages.pretrain import PRETRAIN
from argonne.stages.stage import Stage


def stage_of(recipe: Recipe) -> Stage:
    """The stage that `recipe.stage` names."""
    if recipe.stage == "dpo":
        from argonne.stages.dpo import DPO

        return DPO
    if recipe.stage in CHAT_STAGES:
        from argonne.stages.sft import SFT  # opened only where it is trained

        return SFT
    return PRETRAIN
