"""The packaged recipes: each loads, fits its own schedule, is planned, trains at nano width, and says what its release
used.
"""

from __future__ import annotations

import json
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from argonne.config import CHAT_STAGES
from argonne.keys import check_schedule
from argonne.plan import device_names, make_plan, published
from argonne.plan.build import tokens_before, total_steps
from argonne.presets import presets
from argonne.recipe import RECIPES, load_recipe, recipe_names, to_toml, to_tree
from argonne.train.schedule import curve

PUBLISHED: dict[str, dict[str, Any]] = {
    "argonne-1.0-pretrain": {
        "train.steps": 160_000,
        "batch.tokens_per_step": 48 * 2048,
        "data.sequence_length": 2048,
        "optim.lr": 3e-5,
        "optim.betas": (0.9, 0.999),
        "train.precision": "fp16",
        "data.documents": "first-window",
        "checkpoint.every_steps": 2000,
    },
    "argonne-1.5-pretrain": {
        "train.steps": 80_000,
        "batch.tokens_per_step": 756 * 2048,
        "optim.lr": 5e-5,
        "optim.weight_decay": 0.1,
        "train.precision": "fp16",
        "data.documents": "first-window",
        "checkpoint.every_steps": 300,
    },
    "argonne-2.0-pretrain": {
        "train.tokens": 21_900_000_000,
        "batch.tokens_per_step": 16_384,
        "data.sequence_length": 4096,
        "optim.lr": 1e-4,
        "schedule.min_lr": 1e-5,
        "schedule.kind": "cosine",
        "schedule.warmup": 2000,
        "optim.grad_clip": 1.0,
        "train.precision": "bf16",
        "data.quality_filter": True,
        "data.bos": True,
    },
    "argonne-2.0-plan": {
        "train.steps": 160_000,
        "optim.lr": 3e-4,
        "schedule.min_lr": 3e-5,
        "schedule.kind": "cosine",
        "checkpoint.every_steps": 300,
    },
    "argonne-2.5-pretrain": {
        "train.tokens": 20_839_021_454,
        "batch.tokens_per_step": 20 * 4 * 3 * 1024,
        "data.sequence_length": 1024,
        "optim.lr": 3e-4,
        "schedule.min_ratio": 0.1,
        "schedule.warmup": 1000,
        "optim.betas": (0.9, 0.95),
        "optim.weight_decay": 0.1,
        "optim.grad_clip": 1.0,
        "checkpoint.every_minutes": 30.0,
    },
    "argonne-2.5-continue": {"train.tokens": 55_211_688_156, "optim.lr": 3e-4},
    "argonne-2.5-midtrain": {
        "train.tokens": 16_000_000_000,
        "data.sequence_length": 13_568,
        "model.rope_theta": 1e6,
        "batch.tokens_per_step": 108_544,
        "schedule.kind": "wsd",
        "data.documents": "within",
    },
    "argonne-3.0-pretrain": {
        "train.tokens": 20_839_021_454,
        "batch.tokens_per_step": 38 * 2 * 3 * 1024,
        "schedule.kind": "wsd",
        "schedule.decay": 0.15,
        "schedule.min_ratio": 0.1,
        "schedule.warmup": 1000,
        "optim.lr": 3e-4,
    },
    "argonne-3.0-continue": {"train.tokens": 55_211_688_156, "schedule.decay": 0.15},
}
TUNED = {
    "batch.tokens_per_step": 24 * 2 * 1024,
    "data.sequence_length": 1024,
    "optim.lr": 2e-5,
    "optim.betas": (0.9, 0.95),
    "optim.weight_decay": 0.01,
    "optim.grad_clip": 1.0,
    "schedule.kind": "cosine",
    "schedule.warmup": 100,
    "schedule.min_ratio": 0.1,
    "train.epochs": 1,
    "chat.template": "chatml",
}
THINKING = {**TUNED, "batch.tokens_per_step": 12 * 1024}
PUBLISHED |= {f"argonne-{generation}-sft": TUNED for generation in ("1.0", "1.5", "2.0", "2.5", "3.0")}
PUBLISHED |= {f"argonne-{generation}-cot-sft": THINKING for generation in ("1.0", "1.5", "2.0", "2.5", "3.0")}
PAIRS = {"optim.lr": 2e-6, "dpo.beta": 0.1, "dpo.smoothing": 0.05, "dpo.chosen_weight": 0.05, "dpo.scores": "sum"}
PUBLISHED |= {f"argonne-{generation}-dpo": PAIRS for generation in ("1.0", "1.5", "2.0", "2.5", "3.0")}
NANO = {
    "argonne-1": "nano-1.0",
    "argonne-2": "nano-2.5",
    "argonne-3": "nano-3.0",
    "nano-1": "nano-1.0",
    "nano-2": "nano-2.5",
    "nano-3": "nano-3.0",
}


@pytest.mark.parametrize("name", recipe_names())
def test_a_packaged_recipe_loads_and_survives_being_saved(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    saved = tmp_path / "config.toml"
    saved.write_text(to_toml(recipe))
    assert to_tree(load_recipe(str(saved))) == to_tree(recipe)


@pytest.mark.parametrize("name", recipe_names())
def test_the_schedule_of_a_recipe_fits_its_length(name: str) -> None:
    recipe = load_recipe(name)
    steps = total_steps(recipe, partial(tokens_before, recipe.batch), lambda: 100_000_000)  # of an epoch
    assert steps is not None
    check_schedule(steps, recipe.schedule)
    assert curve(steps, recipe.optim, recipe.schedule)[0][1] > 0


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_opens_with_a_comment_and_sets_no_key_twice(name: str) -> None:
    text = (RECIPES / f"{name}.toml").read_text()
    assert text.startswith("# ")
    assert tomllib.loads(text)


@pytest.mark.parametrize(
    ("name", "key", "value"), [(name, key, value) for name, keys in PUBLISHED.items() for key, value in keys.items()]
)
def test_a_recipe_says_what_its_release_used(name: str, key: str, value: Any) -> None:
    section, field = key.split(".")
    assert getattr(getattr(load_recipe(name), section), field) == value


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith(("-sft", "-dpo"))])
def test_a_recipe_of_conversations_starts_from_its_own_generation(name: str) -> None:
    recipe = load_recipe(name)
    start = str(recipe.model.init_from).removeprefix("runs/")
    assert load_recipe(start).model.preset == recipe.model.preset
    befores = {"sft": ("pretrain", "midtrain"), "cot-sft": ("sft",), "dpo": ("sft", "cot-sft")}
    assert load_recipe(start).stage in befores[recipe.stage]
    assert recipe.data.sequence_length <= (recipe.model.max_position_embeddings or 0)


def test_argonne_1_0_changes_rate_and_batch_at_the_same_step() -> None:
    recipe = load_recipe("argonne-1.0-pretrain")
    assert [(change.step, change.lr) for change in recipe.schedule.steps] == [(62_000, 5e-5)]
    assert [(change.step, change.tokens_per_step) for change in recipe.batch.steps] == [(62_000, 60 * 2048)]


def test_the_figures_in_the_recipes_comments_are_what_the_arithmetic_gives() -> None:
    assert round(80_000 * 756 * 2048 / 1e9, 1) == 123.9  # 1.5: full rows
    assert round(15_453_927_424 / (80_000 * 756)) == 256  # 1.5: tokens a document
    assert round(1_347_890 * 16_384 / 1e9, 2) == 22.08  # 2.0
    assert round(160_000 * 92 * 4096 / 1e9, 1) == 60.3  # 2.0 plan
    assert 64 <= load_recipe("argonne-2.0-plan").batch.tokens_per_step / 4096 <= 128
    assert round(425_975 * 245_760 / 1e9, 1) == 104.7  # 2.5
    assert round(329_148 * 233_472 / 1e9, 2) == 76.85  # 3.0
    assert 20_839_021_454 + 55_211_688_156 == 76_050_709_610


@pytest.mark.parametrize(
    "name",
    [
        "argonne-2.5-pretrain",
        "argonne-2.5-continue",
        "argonne-3.0-pretrain",
        "argonne-3.0-continue",
        "argonne-1.5-pretrain",
    ],
)
def test_a_published_figure_that_does_not_close_is_told(name: str) -> None:
    release = published.PUBLISHED.get(name)
    assert release is not None
    told = release.contradiction()
    assert told is not None
    assert told in make_plan(load_recipe(name), gpu="h200", gpus=3, name=name).warnings


def test_every_released_generation_has_a_recipe() -> None:
    used = {load_recipe(name).model.preset for name in recipe_names()}
    assert (
        {"argonne-1.0", "argonne-1.5", "argonne-2.0", "argonne-2.0-plan", "argonne-2.5", "argonne-3.0"}
        <= used
        <= set(presets())
    )


def at_nano_width(name: str, tokens: Path) -> dict[str, str]:
    """Overrides that keep a recipe's own settings but its size, data and length."""
    preset = next(value for start, value in NANO.items() if name.startswith(start))
    recipe = load_recipe(name)
    overrides = {
        "model.preset": f'"{preset}"',
        "model.init_from": "none",
        "model.vocab_size": "512",
        "model.max_position_embeddings": "64",
        "model.num_hidden_layers": "2",
        "data.tokenizer": "none",
        "data.sources": f"[{{ path = {json.dumps(str(tokens))}, max_epochs = 99 }}]",
        "data.sequence_length": "64",
        "batch.tokens_per_step": "128",
        "batch.steps": "[]",
        "train.steps": "3",
        "train.precision": "fp32",
        "train.threads": "1",
        "checkpoint.every_steps": "2",
        "checkpoint.sample_tokens": "4",
        "eval.windows": "0",
        "log.tensorboard": "false",
    }
    if recipe.schedule.kind == "steps":
        overrides["schedule.steps"] = "[{ step = 2, lr = 5e-5 }]"
    if recipe.schedule.warmup:
        overrides["schedule.warmup"] = "1"
    if recipe.schedule.kind == "wsd":
        overrides["schedule.decay"] = "1"
    return overrides


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "argonne-3.0-pretrain" else pytest.mark.campaign)
        for name in recipe_names()
    ],
)
def test_a_recipe_trains_a_few_steps_at_nano_width(name: str, tokens: Path, tmp_path: Path) -> None:
    from argonne.stages.pretrain import run

    result = run(load_recipe(name, at_nano_width(name, tokens)), tmp_path / "run")
    assert result.outcome.complete
    assert result.outcome.step == 3
    assert (result.run / "final_model" / "model.safetensors").is_file()


def test_the_documents_name_every_recipe_and_every_device() -> None:
    docs = Path(__file__).resolve().parent.parent.parent / "docs"
    recipes, plan = (docs / "recipes.md").read_text(), (docs / "plan.md").read_text()
    assert [name for name in recipe_names() if f"`{name}`" not in recipes] == []
    assert [name for name in device_names() if f"`{name}`" not in plan] == []


@pytest.mark.parametrize("name", recipe_names())
def test_the_dry_run_of_a_recipe_prints_what_would_run(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from argonne.cli import main

    recipe = load_recipe(name)
    verb = recipe.stage if recipe.stage in CHAT_STAGES else "continue" if recipe.model.init_from else "pretrain"
    assert main([verb, name, "--run", str(tmp_path / "run"), "--dry-run"]) == 0
    printed = tomllib.loads(capsys.readouterr().out)
    assert any(printed["train"].get(length, 0) > 0 for length in ("steps", "tokens", "epochs"))
    assert not (tmp_path / "run").exists()
