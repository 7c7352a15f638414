"""The packaged recipes of every generation pass the rehearsal, each chain in one command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from argonne.recipe import load_recipe, recipe_names
from tests.rehearse.commands import Rehearsals

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3600)]
TUNING = ("sft", "cot-sft", "dpo")
CHAINS = {
    "argonne-1.0": ("pretrain", *TUNING),
    "argonne-1.5": ("pretrain", *TUNING),
    "argonne-2.0": ("pretrain", *TUNING),
    "argonne-2.0-plan": ("",),
    "argonne-2.5": ("pretrain", "continue", "midtrain", *TUNING),
    "argonne-3.0": ("pretrain", "continue", *TUNING),
    "nano-1.0": ("", "sft"),
    "nano-2.5": ("",),
    "nano-3.0": ("", "continue", "midtrain", *TUNING),
    "nano-3.0-demo": ("", "midtrain", *TUNING),
}
CHATS = {"sft": "chat.jsonl", "cot-sft": "thoughts.jsonl", "dpo": "pairs.jsonl"}


def names_of(generation: str) -> list[str]:
    return [f"{generation}-{stage}".rstrip("-") for stage in CHAINS[generation]]


def test_every_packaged_recipe_is_in_a_chain() -> None:
    assert sorted(name for generation in CHAINS for name in names_of(generation)) == recipe_names()


@pytest.mark.parametrize("generation", CHAINS)
def test_the_recipes_of_a_generation_pass(generation: str, rehearsals: Rehearsals, folder: Path) -> None:
    """Their data keys name small sets, and the disk is taken to be large."""
    settings = shutil.copytree(folder / "tokens/tokenizer", folder / "tokenizer") / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "bos_token": "<|endoftext|>"})
    )  # 2.0 asks for it
    for name in names_of(generation):
        recipe = load_recipe(name)
        often = 1 if recipe.stage in CHATS else 1_000_000  # the real run's tokens, of a small set
        data = f'sources = [{{ path = "{CHATS.get(recipe.stage, "tokens")}", max_epochs = {often}.0 }}]'
        if recipe.data.input:
            data = 'input = ["topics.jsonl"]\ntokenizer = "tokenizer"'
        (folder / f"my-{name}.toml").write_text(f'base = "{name}"\n[data]\n{data}\n')
    words = " ".join(f"my-{name}.toml" for name in names_of(generation))
    code, said = rehearsals.run(f"rehearse {words}", folder, plant="much_room")
    assert code == 0, said[-3000:]
    assert [name for name in names_of(generation) if f"my-{name}.toml: passed in" not in said] == []
    print(said[said.index("passed in") - 40 :])


@pytest.mark.parametrize("degrees", ["--parallel.nproc 2", "--gpus 4 --parallel.shard 2"])
def test_the_mesh_is_kept_on_ranks_of_this_cpu(degrees: str, rehearsals: Rehearsals, folder: Path) -> None:
    code, said = rehearsals.run(f"rehearse pre.toml sft.toml {degrees}", folder)
    assert code == 0, said[-3000:]
