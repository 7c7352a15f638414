"""Recipes that go on from one another's runs: the folder that one writes without `--run` is the one the next names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from argonne.cli import main
from argonne.errors import InputError
from argonne.recipe import RECIPES, load_recipe, recipe_name, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_what_a_packaged_recipe_names_as_a_run_is_the_default_folder_of_another(name: str) -> None:
    recipe = load_recipe(name)
    named = [str(recipe.model.init_from or ""), *(source.path for source in recipe.data.sources), *recipe.data.input]
    runs = {Path(*Path(path).parts[:2]) for path in named if path.startswith("runs/")}
    assert runs <= {Path("runs") / other for other in recipe_names() if other != name}


@pytest.mark.parametrize("name", recipe_names())
def test_the_run_of_a_packaged_recipe_has_its_name(name: str) -> None:
    assert recipe_name(name) == name


def test_some_packaged_recipes_are_chains() -> None:
    assert sum("init_from" in path.read_text() for path in RECIPES.glob("*.toml")) >= 4


@pytest.mark.parametrize(
    ("file", "name"),
    [("my.toml", "my"), ("my-1.5.toml", "my-1.5"), ("of/mine/a.b.toml", "a.b"), ("./my-2.0", "my-2.0")],
)
def test_a_recipe_file_gives_its_run_its_name(file: str, name: str) -> None:
    assert recipe_name(file) == name


def test_a_packaged_name_behind_a_path_is_recognised() -> None:
    with pytest.raises(InputError, match=r"did you mean the packaged recipe 'nano-3\.0'"):
        load_recipe("recipes/nano-3.0")


def test_a_chain_of_packaged_recipes_runs_without_naming_a_run(
    tokens: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    short: dict[str, Any] = {
        "data.sources": f"[{{ path = {json.dumps(str(tokens))}, max_epochs = 9 }}]",
        "train.steps": 3,
        "train.threads": 1,
        "schedule.warmup": 0,
        "checkpoint.sample_tokens": 2,
        "eval.windows": 2,
        "log.tensorboard": "false",
    }
    keys = [text for key, value in short.items() for text in (f"--{key}", str(value))]
    for verb, name in (
        ("pretrain", "nano-3.0"),
        ("continue", "nano-3.0-continue"),
        ("continue", "nano-3.0-midtrain"),
    ):
        assert main([verb, name, *keys]) == 0
        assert (tmp_path / "runs" / name / "COMPLETE").is_file()
    parents = [
        json.loads((tmp_path / "runs" / name / "manifest.json").read_text())["parent"]
        for name in ("nano-3.0-continue", "nano-3.0-midtrain")
    ]
    assert [parent["model"] for parent in parents] == ["runs/nano-3.0"] * 2
