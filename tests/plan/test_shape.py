"""One answer to which model a run trains: a plan, a dry run and training give the same parameters and shape."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from argonne.cli import main
from argonne.config import ModelSection, Recipe
from argonne.errors import InputError
from argonne.plan import make_plan
from argonne.plan.shape import as_trained, fitted, vocabulary_of
from argonne.presets import preset
from argonne.recipe import load_recipe, recipe_names
from argonne.stages.pretrain import run
from argonne.stages.start import architecture_fields, find_start
from argonne.tokens.tokenizer import load_tokenizer
from argonne.train.run import RunFolder

Nano = Callable[..., Recipe]
TINY = {
    "train.steps": "1",
    "train.threads": "1",
    "batch.tokens_per_step": "64",
    "data.sequence_length": "64",
    "schedule.warmup": "0",
    "schedule.decay": "0",
    "checkpoint.sample_tokens": "1",
    "eval.windows": "0",
    "log.tensorboard": "false",
}


def tiny(source: Path, name: str = "nano-3.0", **more: str) -> Recipe:
    return load_recipe(
        name, {**TINY, "data.sources": f"[{{ path = {json.dumps(str(source))}, max_epochs = 99 }}]", **more}
    )


def trained_model(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Trains a step, and returns the config.json that came out, with the parameters that the run says it has."""
    run(recipe, folder)
    config: dict[str, Any] = json.loads((folder / "final_model" / "config.json").read_text())
    return {**config, "parameters": json.loads((folder / "manifest.json").read_text())["parameters"]}


def same_as_planned(recipe: Recipe, found: dict[str, Any]) -> None:
    model = as_trained(recipe).model
    assert make_plan(recipe).parameters == found["parameters"]
    for name, value in architecture_fields(model).items():
        if name in found:
            stored = tuple(found[name]) if isinstance(found[name], list) else found[name]
            assert (stored or None) == (value or None), name


# ---------------------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("entries", [512, 4096])
def test_the_datas_tokenizer_comes_before_a_presets_vocabulary(
    entries: int, tokens: Path, write_tokens: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny(tokens if entries == 512 else write_tokens("numbers", [500, 400]))
    found = trained_model(recipe, tmp_path / "run")
    assert found["vocab_size"] == entries
    same_as_planned(recipe, found)


def test_a_given_vocabulary_that_is_large_enough_wins(tokens: Path, tmp_path: Path) -> None:
    recipe = tiny(tokens, **{"model.vocab_size": "2048"})  # the preset's own number, but given
    found = trained_model(recipe, tmp_path / "run")
    assert found["vocab_size"] == 2048
    same_as_planned(recipe, found)


def test_a_given_vocabulary_that_is_too_small_is_refused_by_plan_and_training(tokens: Path, tmp_path: Path) -> None:
    recipe = tiny(tokens, **{"model.vocab_size": "300"})
    for ask in (make_plan, lambda recipe: run(recipe, tmp_path / "run")):
        with pytest.raises(InputError, match=r"model\.vocab_size: found 300, but the data's tokenizer has 512"):
            ask(recipe)


def test_the_recipe_of_getting_started_trains_on_the_tokens_it_tells_to_make(
    shared: Path, write_tokens: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(shared / "cases" / "vocab" / "mine.toml", tmp_path / "mine.toml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens").mkdir()
    write_tokens("tokens/mine", [2500, 1500])  # 4,096 entries, as `prepare --train-tokenizer 4096` makes
    recipe = load_recipe(
        "mine.toml", {key: TINY[key] for key in ("train.steps", "schedule.warmup", "schedule.decay", "eval.windows")}
    )
    found = trained_model(recipe, tmp_path / "run")
    assert (found["vocab_size"], found["hidden_size"]) == (4096, 256)
    same_as_planned(recipe, found)


@pytest.mark.parametrize("name", ["hole_small", "hole_eos"])
def test_a_tokenizer_whose_ids_have_a_hole_needs_a_row_up_to_its_highest_id(
    name: str, shared: Path, tmp_path: Path
) -> None:
    case = shared / "cases" / "tokenizer_hole"
    assert (
        main(
            [
                "prepare",
                "--input",
                str(case / "a.jsonl"),
                "--tokenizer",
                str(case / name),
                "--out",
                str(tmp_path / "set"),
            ]
        )
        == 0
    )
    recipe = tiny(tmp_path / "set", **{"model.hidden_size": "8", "model.intermediate_size": "8"})
    found = trained_model(recipe, tmp_path / "run")
    assert found["vocab_size"] == {"hole_small": 2001, "hole_eos": 70001}[name]
    same_as_planned(recipe, found)
    text = load_recipe(
        "nano-3.0", {"data.input": f'["{case}/a.jsonl"]', "data.tokenizer": json.dumps(str(case / name))}
    )
    assert vocabulary_of(text.data) == found["vocab_size"]


def test_the_vocabulary_of_a_tokenizer_with_holes_is_that_of_training(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "holes"))
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["model"]["vocab"]["far"] = 3000
    like = {**tree["added_tokens"][0], "special": False}
    tree["added_tokens"] += [{**like, "id": 3000, "content": "far"}, {**like, "id": 5000, "content": "late"}]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    recipe = load_recipe("nano-3.0", {"data.input": '["x"]', "data.tokenizer": json.dumps(str(folder))})
    assert vocabulary_of(recipe.data) == load_tokenizer(folder).vocab_size == 3001


def test_the_vocabulary_of_tokens_of_another_program_is_that_of_the_tokenizer_beside_them(
    numbers_folder: Path, shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "all.bin").write_bytes(bytes(400))
    recipe = tiny(Path(f"raw-uint16:{tmp_path}/all.bin"))
    assert vocabulary_of(recipe.data) is None
    shutil.copytree(numbers_folder, tmp_path / "tokenizer")
    assert vocabulary_of(recipe.data) == 4096
    named = tiny(Path(f"{tmp_path}/*.bin"), **{"data.tokenizer": json.dumps(str(shared / "tokenizers" / "gpt2"))})
    assert vocabulary_of(named.data) == 50257


def test_a_dry_run_prints_the_model_that_would_be_trained(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "nano-3.0", "--data.sources", str(tokens), "--dry-run"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["model"]["vocab_size"] == 512


# ------------------------------------------------------------------------------------------------------- given weights


@pytest.fixture
def parent(nano: Nano, tmp_path: Path) -> Path:
    """A run of another shape than its preset's: 2 layers of 32, full attention, another base of the frequencies."""
    keys = {
        "model.layer_types": '["full_attention", "full_attention"]',
        "model.rope_theta": "500.0",
        "model.max_position_embeddings": "999",
        "train.steps": "1",
        "schedule.warmup": "0",
        "schedule.decay": "0",
    }
    run(nano(**keys), tmp_path / "parent")
    return tmp_path / "parent"


def child(parent: Path, tokens: Path, name: str = "nano-3.0-continue", **more: str) -> Recipe:
    return tiny(tokens, name, **{"model.init_from": json.dumps(str(parent)), **more})


@pytest.mark.parametrize("name", ["nano-3.0-continue", "nano-2.5"])
def test_the_weights_shape_comes_before_the_presets(name: str, parent: Path, tokens: Path, tmp_path: Path) -> None:
    recipe = child(parent, tokens, name)
    found = trained_model(recipe, tmp_path / "child")
    before = json.loads((parent / "final_model" / "config.json").read_text())
    shape = ("hidden_size", "num_hidden_layers", "layer_types", "q_norm", "max_position_embeddings", "rope_parameters")
    assert {key: found[key] for key in shape} == {key: before[key] for key in shape}
    same_as_planned(recipe, found)


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("hidden_size", "64", "32"),
        ("vocab_size", "600", "512"),
        ("num_hidden_layers", "4", "2"),
        ("q_norm", "false", "True"),
        ("hidden_act", '"gelu"', "silu"),
    ],
)
def test_a_given_field_that_contradicts_the_weights_is_refused_by_plan_and_training(
    key: str, value: str, found: str, parent: Path, tokens: Path, tmp_path: Path
) -> None:
    recipe = child(parent, tokens, **{f"model.{key}": value})
    for ask in (make_plan, lambda recipe: run(recipe, tmp_path / "child")):
        with pytest.raises(InputError, match=rf"model\.{key}: found .*weights.* {found}"):
            ask(recipe)


def test_what_leaves_the_weights_their_meaning_can_be_given(parent: Path, tokens: Path, tmp_path: Path) -> None:
    asked = {
        "model.rope_theta": "1e6",
        "model.max_position_embeddings": "2000",
        "model.hidden_dropout": "0.1",
        "model.layer_types": '["full_attention", "sliding_attention"]',
        "model.sliding_window": "16",
        "model.hidden_size": "32",
    }
    recipe = child(parent, tokens, **asked)
    found = trained_model(recipe, tmp_path / "child")
    assert (found["rope_parameters"]["rope_theta"], found["max_position_embeddings"]) == (1e6, 2000)
    assert (found["layer_types"][1], found["sliding_window"]) == ("sliding_attention", 16)
    same_as_planned(recipe, found)


def test_a_recipe_without_a_preset_can_change_the_frequencies_of_its_weights(
    parent: Path, tokens: Path, tmp_path: Path
) -> None:
    recipe = child(parent, tokens, **{"model.preset": "none", "model.rope_theta": "1e5"})
    found = trained_model(recipe, tmp_path / "child")
    assert found["rope_parameters"]["rope_theta"] == 1e5
    same_as_planned(recipe, found)


def test_a_given_key_that_does_nothing_with_these_weights_is_refused(
    parent: Path, tokens: Path, tmp_path: Path
) -> None:
    recipe = child(parent, tokens, **{"model.sliding_window": "16"})  # the preset has sliding layers, the weights none
    for ask in (make_plan, lambda recipe: run(recipe, tmp_path / "child")):
        with pytest.raises(InputError, match=r"model\.sliding_window: found 16, but it acts only with"):
            ask(recipe)


def test_a_continued_run_goes_on_when_its_parent_is_gone(parent: Path, tokens: Path, tmp_path: Path) -> None:
    recipe = child(parent, tokens, **{"train.steps": "3"})
    run(recipe, tmp_path / "child", stop_after_step=1)
    shutil.rmtree(parent)
    assert run(recipe, tmp_path / "child").outcome.complete
    run(recipe, tmp_path / "child")  # a finished run is told the same
    with pytest.raises(InputError, match=r"model\.hidden_size"):
        run(child(parent, tokens, **{"train.steps": "3", "model.hidden_size": "64"}), tmp_path / "child")


def test_a_resumed_run_cannot_be_allowed_another_shape(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "run", stop_after_step=4)
    with pytest.raises(InputError, match=r"model\.hidden_size: found 48, but the weights .* 32"):
        run(nano(**{"model.hidden_size": "48"}), tmp_path / "run", allow=["model.hidden_size"])


def test_learned_positions_of_weights_cannot_grow(
    nano: Nano, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        nano("nano-1.0", **{key: TINY[key] for key in ("train.steps", "schedule.warmup", "schedule.decay")}),
        tmp_path / "parent",
    )
    recipe = child(
        tmp_path / "parent", tokens, "nano-1.0", **{"data.sequence_length": "512", "batch.tokens_per_step": "512"}
    )
    for ask in (make_plan, lambda recipe: run(recipe, tmp_path / "child")):
        with pytest.raises(InputError, match=r"model\.max_position_embeddings: found 512, .* 256"):
            ask(recipe)
    file = tmp_path / "longer.toml"
    file.write_text(
        f'base = "nano-1.0"\nstage = "midtrain"\n[model]\ninit_from = "{tmp_path / "parent"}"\n[data]\n'
        f'sequence_length = 512\nsources = [{{ path = "{tokens}", max_epochs = 99 }}]\n'
    )
    capsys.readouterr()
    assert main(["midtrain", str(file), "--run", str(tmp_path / "longer")]) == 2
    assert "model.max_position_embeddings: found 512" in capsys.readouterr().err


def test_weights_that_are_not_on_this_disk_leave_the_presets_sizes_and_a_note() -> None:
    plan = make_plan(load_recipe("argonne-2.5-continue"))
    assert plan.parameters == 1_273_807_360
    assert any("runs/argonne-2.5-pretrain" in note for note in plan.warnings)


# ----------------------------------------------------------------------------------------------------- packaged recipes


@pytest.mark.parametrize("here", [False, True], ids=["nothing here", "data and weights here"])
@pytest.mark.parametrize("name", recipe_names())
def test_plan_and_training_agree_on_every_packaged_recipe(
    name: str, here: bool, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from argonne.model.build import config_from_fields, count_parameters

    recipe = load_recipe(name)
    monkeypatch.chdir(tmp_path)
    vocabulary = preset(recipe.model.preset or "").fields["vocab_size"]
    if here:
        vocabulary = 512
        for source in recipe.data.sources:
            shutil.copytree(tokens, tmp_path / source.path)
        if recipe.data.tokenizer:
            shutil.copytree(tokens / "tokenizer", tmp_path / recipe.data.tokenizer)
        if recipe.model.init_from:
            folder = tmp_path / recipe.model.init_from / "final_model"
            folder.mkdir(parents=True)
            (folder.parent / "metrics.jsonl").touch()
            kept = {**preset(recipe.model.preset or "").fields, "vocab_size": 640, "num_hidden_layers": 4}
            kept["layer_types"] = kept["layer_types"][:4]
            config = config_from_fields(kept).to_dict()
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "argonne2"}))
    begin = recipe if here else load_recipe(name, {"model.init_from": "none"})
    start = find_start(RunFolder(tmp_path / "run"), begin, None, print)
    model = fitted(begin, vocabulary, start.architecture).model
    assert model.vocab_size == (640 if here and recipe.model.init_from else vocabulary)
    assert make_plan(recipe).parameters == count_parameters(config_from_fields(architecture_fields(model)))
    assert architecture_fields(model) == architecture_fields(as_trained(recipe).model)


def test_a_model_of_no_sizes_and_weights_that_are_nowhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        as_trained(Recipe(model=ModelSection(init_from=str(tmp_path / "nothing"))))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json: has no vocab_size; of an earlier release"):
        as_trained(Recipe(model=ModelSection(init_from=str(tmp_path))))
