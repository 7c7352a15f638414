"""Recipes: what is accepted, what is refused, and that what is written reads back the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne import keys, recipe
from argonne.cli.command import parse_overrides
from argonne.config import CheckpointSection, Recipe
from argonne.errors import InputError

MINIMAL = """
[model]
preset = "nano-3.0"
[data]
sources = [{ path = "tokens" }]
sequence_length = 256
[batch]
tokens_per_step = 2048
[schedule]
decay = 0.2
[train]
steps = 10
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "mine.toml").write_text(MINIMAL)
    return tmp_path / "mine.toml"


def test_a_saved_recipe_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    changes = {
        "optim.betas": "[0.8, 0.99]",
        "stop.wall_time": "90m",
        "batch.steps": "[{ step = 4, tokens_per_step = 4096 }]",
    }
    first = recipe.load_recipe(str(path), changes)
    (tmp_path / "saved.toml").write_text(recipe.to_toml(first))
    assert recipe.load_recipe(str(tmp_path / "saved.toml")) == first


@given(st.text())
def test_any_prompt_survives_being_saved(prompt: str) -> None:
    tree = recipe.tomllib.loads(
        recipe.to_toml(dataclasses.replace(Recipe(), checkpoint=CheckpointSection(sample_prompt=prompt)))
    )
    assert tree["checkpoint"]["sample_prompt"] == prompt


def test_every_key_has_a_meaning() -> None:
    assert [name for name, item in keys.all_keys().items() if len(item.metadata["meaning"]) < 8] == []


def test_the_preset_fills_the_model_and_given_fields_win(path: Path) -> None:
    model = recipe.load_recipe(str(path), {"model.hidden_size": "64", "model.num_hidden_layers": "6"}).model
    assert (model.hidden_size, model.head_dim, model.final_logit_softcapping) == (64, 32, 15.0)
    assert model.layer_types == ("full_attention", "sliding_attention") * 3


def test_a_base_is_merged_below_and_a_circle_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "top.toml").write_text('base = "mine.toml"\n[optim]\nlr = 0.5\n')
    found = recipe.load_recipe(str(tmp_path / "top.toml"))
    assert (found.optim.lr, found.train.steps) == (0.5, 10)
    (tmp_path / "mine.toml").write_text('base = "top.toml"\n')
    with pytest.raises(InputError, match="circle"):
        recipe.load_recipe(str(tmp_path / "top.toml"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lrr", "1", "did you mean 'optim.lr'"),
        ("lr", "1", "did you mean 'optim.lr'"),
        ("optim.lr", "fast", "optim.lr: found 'fast', expected a number"),
        ("optim.lr", "-1", "expected more than 0"),
        ("train.steps", "1.5", "train.steps: found 1.5"),
        ("data.order", "random", "expected one of 'sequential', 'shuffled'"),
        ("model.preset", "nano-3", "did you mean 'nano-3.0'"),
        ("model.num_key_value_heads", "3", "expected a multiple of model.num_key_value_heads = 3"),
        ("model.head_dim", "31", "expected an even number"),
        ("model.layer_types", '["full_attention"]', "found 1 entries"),
        ("model.sliding_window", "0", "model.sliding_window: not set"),
        ("batch.tokens_per_step", "2000", "expected a multiple of the sequence length 256"),
        ("train.tokens", "5", "found steps and tokens, expected exactly one"),
        ("schedule.min_lr", "1e-5", None),
        ("data.input", '["*.txt"]', "data.sources and data.input are both set"),
        ("batch.micro", "big", 'expected "auto" or a number'),
        ("schedule.decay", "-1", "schedule.decay: found -1.0, expected at least 0"),
        ("schedule.warmup", "-1", "schedule.warmup: found -1, expected at least 0"),
        ("schedule.warmup", "9999", "schedule.warmup: found 9999 steps, more than the run's"),
        ("schedule.decay", "9999", "and 9999 of decay do not fit into the run's"),
        ("stop.wall_time", "soon", "stop.wall_time: found 'soon', expected seconds, or 90m"),
        ("stop.grace", "soon", "stop.grace: found 'soon'"),
        ("stop.deadline", "soon", "stop.deadline: found 'soon', expected ISO 8601"),
        ("log.telemetry_limit", "12:30", "log.telemetry_limit: found '12:30', expected hours or minutes"),
        ("parallel.timeout", "soon", "parallel.timeout: found 'soon'"),
        ("schedule.min_ratio", "1.5", "schedule.min_ratio: found 1.5, expected from 0 to 1"),
        ("schedule.kind", "linear", "schedule.kind: found 'linear', expected one of"),
        ("schedule.steps", "[{ step = 1, lr = 1e-4 }]", "acts only with schedule.kind = steps"),
        ("optim.lr", "inf", "optim.lr: found inf, expected more than 0"),
        ("optim.lr", "nan", "optim.lr: found nan"),
        ("optim.eps", "inf", "optim.eps: found inf"),
        ("checkpoint.every_minutes", "-inf", "checkpoint.every_minutes: found -inf"),
        ("batch.steps", "[{ step = 4, tokens_per_step = 4096 }, { step = 4, tokens_per_step = 2048 }]", "each once"),
        ("batch.steps", "[{ step = -4, tokens_per_step = 4096 }]", "batch.steps[0].step: found -4"),
        ("batch.steps", "[{ step = 4 }]", "changes nothing"),
        ("optim.muon_lr", "0.1", "acts only with optim.name = muon"),
        ("train.checkpointing_stride", "3", None),
        ("data.bos", "true", "data.bos: found True, but it acts only with data.input"),
        ("data.hold_out", "0.1", "acts only with data.input"),
        ("data.quality_filter", "true", "acts only with data.input"),
        ("data.text_column", "content", "acts only with data.input"),
        ("data.prefetch", "all", "acts only with data.input"),
        ("data.max_drop_fraction", "0.5", "acts only with data.input"),
        ("eval.task_limit", "7", "acts only with eval.tasks"),
        ("checkpoint.keep_best", "true", "acts only with eval.every_steps != 0"),
        ("model.rope_theta", "1e5", None),
    ],
)
def test_bad_values_are_refused_with_the_key_and_what_would_do(
    path: Path, key: str, value: str, message: str | None
) -> None:
    if message is None:
        recipe.load_recipe(str(path), {key: value})
        return
    with pytest.raises(InputError) as caught:
        recipe.load_recipe(str(path), {key: value})
    assert message in str(caught.value)


def test_sources_given_as_paths_are_read_as_often_as_the_recipes_own(tmp_path: Path) -> None:
    given = parse_overrides(["--data.sources", "a:0.7", "b"])
    assert [source.max_epochs for source in recipe.load_recipe("nano-3.0-dpo", given).data.sources] == [3.0, 3.0]
    whole = parse_overrides(["--data.sources", '[{ path = "a" }]'])
    assert recipe.load_recipe("nano-3.0-dpo", whole).data.sources[0].max_epochs == 1.0
    own = tmp_path / "own.toml"
    two = '[{ path = "a", max_epochs = 2.0 }, { path = "b", max_epochs = 9.0 }]'
    own.write_text(f'base = "nano-3.0-dpo"\n[data]\nsources = {two}\n')
    assert [source.max_epochs for source in recipe.load_recipe(str(own), given).data.sources] == [1.0, 1.0]


def test_a_rate_of_zero_in_a_table_is_refused(path: Path) -> None:
    steps = {"schedule.kind": "steps", "schedule.decay": "none", "schedule.steps": "[{ step = 5, lr = 0.0 }]"}
    with pytest.raises(InputError, match=r"schedule\.steps\[0\]\.lr: found 0\.0, expected more than 0"):
        recipe.load_recipe(str(path), steps)


def test_a_key_that_the_mode_switches_off_is_refused_where_it_was_given(path: Path) -> None:
    for idle in (
        {"train.activation_checkpointing": "none", "train.checkpointing_stride": "3"},
        {"schedule.kind": "constant"},
    ):
        with pytest.raises(InputError, match="but it acts only with"):  # decay stands in the person's own file
            recipe.load_recipe(str(path), idle)


def test_what_a_packaged_recipe_or_a_base_says_for_another_mode_is_laid_aside(path: Path, tmp_path: Path) -> None:
    found = recipe.load_recipe("nano-3.0", {"schedule.kind": "constant"})
    assert (found.schedule.decay, found.schedule.min_ratio) == (None, None)
    (tmp_path / "top.toml").write_text('base = "mine.toml"\n[schedule]\nkind = "cosine"\n')
    assert recipe.load_recipe(str(tmp_path / "top.toml")).schedule.decay is None


def test_a_given_way_to_say_one_thing_takes_the_place_of_a_packaged_one() -> None:
    found = recipe.load_recipe(
        "nano-3.0",
        {"train.tokens": "8192", "schedule.min_lr": "1e-5", "data.input": '["a.txt"]', "data.tokenizer": "t"},
    )
    assert (found.train.steps, found.schedule.min_ratio, found.data.sources) == (None, None, ())


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_a_packaged_recipe_is_accepted_as_a_persons_own_file_and_what_is_saved_says_the_same(
    name: str, tmp_path: Path
) -> None:
    own = recipe.load_recipe(str(recipe.RECIPES / f"{name}.toml"))
    assert own == recipe.load_recipe(name)
    (tmp_path / "config.toml").write_text(recipe.to_toml(own))
    assert recipe.load_recipe(str(tmp_path / "config.toml")) == own


def test_wsd_without_decay_is_refused_and_an_explicit_zero_is_taken(path: Path) -> None:
    path.write_text(MINIMAL.replace("decay = 0.2", ""))
    with pytest.raises(InputError, match=r"schedule\.decay: not set"):
        recipe.load_recipe(str(path))
    assert recipe.load_recipe(str(path), {"schedule.decay": "0"}).schedule.decay == 0


def test_an_unknown_recipe_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"did you mean 'nano-3\.0'"):
        recipe.load_recipe("nano-3.O")


def test_differences_name_each_changed_key() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert recipe.differences(old, new) == {"a.c": (2, 4), "d": (3, None), "e": (None, 5)}


def test_what_a_change_of_batch_leaves_unset_goes_on_from_the_change_before(path: Path) -> None:
    changes = "[{ step = 8, sequence_length = 3072 }, { step = 4, tokens_per_step = 6144 }]"
    found = recipe.load_recipe(str(path), {"batch.steps": changes})
    assert keys.batches(found.batch, 256) == [
        ("batch", 0, 2048, 256),
        ("batch.steps[1]", 4, 6144, 256),
        ("batch.steps[0]", 8, 6144, 3072),
    ]
    with pytest.raises(
        InputError,
        match=r"batch\.steps\[0\]\.tokens_per_step: found 6144, expected a multiple of the sequence length 4096",
    ):
        recipe.load_recipe(str(path), {"batch.steps": changes.replace("3072", "4096")})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schedule.kind", "cosine", "schedule.decay: found 0.2, but it acts only with schedule.kind = wsd"),
        ("schedule.min_lr", "1.0", "from 0 to optim.lr"),
        ("schedule.steps", "[{ step = 1, lr = 1e-4 }]", "but it acts only with schedule.kind = steps"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused_before_a_length_is_known(
    path: Path, key: str, value: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        recipe.load_recipe(str(path), {key: value})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "read"),
    [
        ("stop.wall_time", "12:30:00", "12:30:00"),
        ("stop.wall_time", "90", "90"),
        ("stop.deadline", "2026-11-21T18:00:00+00:00", "2026-11-21 18:00:00+00:00"),
        ("log.telemetry_limit", "00:05:00", "00:05:00"),
    ],
)
def test_a_time_that_toml_knows_is_taken_without_quotes(key: str, text: str, read: str) -> None:
    section, name = key.split(".")
    assert getattr(getattr(recipe.load_recipe("nano-3.0", {key: text}), section), name) == read
