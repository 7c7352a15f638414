"""Degrees that a recipe leaves `auto`: which the plan takes, what it says of them, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from argonne.cli import main
from argonne.config import Recipe
from argonne.errors import InputError
from argonne.plan import device, make_plan, plan_of_run, settle, shape_of
from argonne.plan import mesh as plan_mesh
from argonne.plan.build import choose_setup
from argonne.plan.mesh import Layout, layouts
from argonne.recipe import load_recipe, to_toml

ALL = ("shard", "tensor", "context", "pipeline")


def asked(name: str = "argonne-3.0-pretrain", *opened: str, **given: str) -> Recipe:
    keys = {**dict.fromkeys(opened, "auto"), **given}
    return load_recipe(name, {f"parallel.{key}": value for key, value in keys.items()})


def degrees(recipe: Recipe) -> dict[str, int]:
    names = ("replicate", *ALL)
    return {name: getattr(recipe.parallel, name) for name in names if getattr(recipe.parallel, name) != 1}


def test_auto_is_read_from_a_file_and_written_as_auto(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('base = "nano-3.0"\n[parallel]\nshard = "auto"\nreplicate = "auto"\n')
    recipe = load_recipe(str(tmp_path / "my.toml"))
    assert (recipe.parallel.open, recipe.parallel.replicate) == (("shard",), 0)
    (tmp_path / "again.toml").write_text(to_toml(recipe))
    assert 'shard = "auto"' in to_toml(recipe)
    assert load_recipe(str(tmp_path / "again.toml")).parallel == recipe.parallel


@pytest.mark.parametrize("value", ["automatic", "-1", "1.5"])
def test_another_word_or_number_is_refused_by_the_key(value: str) -> None:
    with pytest.raises(InputError, match=r"parallel\.shard: found"):
        asked(shard=value)


def test_degrees_that_are_numbers_are_left_as_they_are() -> None:
    recipe = asked(shard="2")
    assert settle(recipe, device("h200"), 8) == (recipe, None)


@pytest.mark.parametrize(
    ("gpu", "opened", "given", "found"),
    [
        ("h200", ALL, {}, {"replicate": 8}),
        ("a100-40gb", ALL, {}, {"replicate": 4, "shard": 2}),
        ("rtx-4090", ALL, {}, {"shard": 8}),
        ("rtx-4090", ("shard",), {"tensor": "2"}, {"replicate": 2, "shard": 2, "tensor": 2}),
        ("h200", ("shard",), {"replicate": "2"}, {"replicate": 2, "shard": 4}),
        ("a100-40gb", ("tensor",), {}, {"replicate": 4, "tensor": 2}),
    ],
)
def test_the_first_layout_that_fits_is_taken_and_a_number_stays_what_it_is(
    gpu: str, opened: tuple[str, ...], given: dict[str, str], found: dict[str, int]
) -> None:
    settled, _ = settle(asked("argonne-3.0-pretrain", *opened, **given), device(gpu), 8)
    assert degrees(settled) == found


def test_least_communication_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_mesh, "check_mesh", lambda parallel, workers: None)
    recipe = asked("argonne-3.0-pretrain", "shard", "tensor", "pipeline")
    found = layouts(recipe, shape_of(recipe.model), 4, 2)
    assert found == [
        Layout(replicate=4),
        Layout(replicate=2, shard=2),
        Layout(shard=4),  # over more than a node of two
        Layout(replicate=2, tensor=2),
        Layout(shard=2, tensor=2),
        Layout(replicate=2, pipeline=2),
        Layout(shard=2, pipeline=2),
        Layout(tensor=2, pipeline=2),
        Layout(pipeline=4),
    ]


def test_a_shard_within_a_node_comes_before_a_smaller_one_over_the_edge_of_one() -> None:
    recipe = asked("argonne-3.0-pretrain", "shard")
    order = [layout.shard for layout in layouts(recipe, shape_of(recipe.model), 24)]
    assert order == [1, 2, 4, 8, 3, 6, 12, 24]


def test_what_is_refused_is_not_chosen() -> None:
    recipe = asked("argonne-3.0-pretrain", *ALL)
    found = layouts(recipe, shape_of(recipe.model), 24)
    assert {layout.tensor for layout in found} == {1, 2, 4}  # of 12 heads, within a node of 8
    assert not any(layout.context > 1 and (layout.tensor > 1 or layout.pipeline > 1) for layout in found)


@pytest.mark.parametrize(
    ("opened", "given", "said"),
    [
        (("shard",), {"tensor": "2", "context": "2"}, "expected one of them to be 1"),
        (("shard",), {"tensor": "3"}, "shard auto, tensor 3, .* do not make 8 devices; give --gpus a multiple of 3"),
        (("tensor",), {"shard": "3", "replicate": "2"}, "do not make 8 devices; give --gpus a multiple of 6"),
    ],
)
def test_numbers_that_no_open_degree_can_complete_are_refused(
    opened: tuple[str, ...], given: dict[str, str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        settle(asked("argonne-3.0-pretrain", *opened, **given), device("h200"), 8)


def test_what_fits_nowhere_is_told_what_would_be_needed_unless_memory_is_allowed() -> None:
    recipe, card = asked("argonne-2.0-pretrain", "shard"), device("rtx-4090")
    said = r"memory: a step .* GB usable; would fit on 8 x rtx-4090 \(--parallel.tensor 2\) or 256 x rtx-4090"
    with pytest.raises(InputError, match=said):
        settle(recipe, card, 8)
    assert degrees(settle(recipe, card, 8, overrun=True)[0]) == {"shard": 8}


def test_the_line_says_what_was_chosen_and_why() -> None:
    _, one = settle(asked("argonne-3.0-pretrain", "shard"), device("h200"), 8)
    assert one == "replicate 8 (auto): a step takes 141.3 GB of the 142.6 GB usable on each h200"
    _, two = settle(asked("argonne-3.0-pretrain", "shard"), device("a100-40gb"), 8)
    assert two == (
        "replicate 4 x shard 2 (auto): a step takes 39.9 GB of the 40.2 GB usable on each a100-40gb, and with "
        "replicate 8 58.7 GB"
    )


def test_a_settled_recipe_is_planned_and_run_as_it_was_chosen() -> None:
    recipe, card = asked("argonne-3.0-pretrain", *ALL), device("a100-40gb")
    plan, (settled, told) = make_plan(recipe, gpu="a100-40gb", gpus=8), settle(recipe, card, 8)
    setup = choose_setup(settled, card, 8)
    stored = plan_of_run(settled, setup, card, 8)
    assert plan.layout == stored["layout"]
    assert (plan.layout_reason, plan.refusals, stored["layout_reason"]) == (told, [], None)
    assert (plan.memory, setup.rows) == (stored["memory"], plan.micro_rows)


def test_a_schedule_is_idle_where_no_pipeline_is_needed() -> None:
    settled, _ = settle(asked("nano-3.0", "pipeline", schedule="gpipe"), device("h200"), 1)
    assert (settled.parallel.pipeline, settled.parallel.schedule) == (1, "1f1b")


def test_the_nodes_at_hand_count_and_not_those_of_the_plan() -> None:
    recipe = asked("argonne-2.0-pretrain", "tensor")
    two = replace(device("h100"), node=2)
    found = layouts(recipe, shape_of(recipe.model), 8, two.node)
    assert max(layout.tensor for layout in found) == 2


def test_the_command_tells_the_degrees_and_why_and_its_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "argonne-3.0-pretrain", "--gpu", "a100-40gb", "--gpus", "8", "--parallel.shard", "auto"]
    assert main(words) == 0
    assert "  parallel       replicate 4 x shard 2 (auto): a step takes 39.9 GB" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["layout"] == {"replicate": 4, "shard": 2, "tensor": 1, "context": 1, "pipeline": 1}
    assert plan["layout_reason"].startswith("replicate 4 x shard 2 (auto)")
