"""Checkpoints: which are kept, which are read, which are refused, and in which order they reach the disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne import files
from argonne.config import CheckpointSection, Recipe
from argonne.errors import InputError
from argonne.layout import last_checkpoint
from argonne.model.load import load_model, read_checkpoint_tensors
from argonne.parallel.mesh import Mesh
from argonne.recipe import load_recipe
from argonne.stages.pretrain import run
from argonne.train.checkpoint import (
    LAST,
    STATE,
    clean_leftovers,
    list_checkpoints,
    load_tensors,
    newest_complete,
    point_last,
    prune,
    read_state,
)
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]


def silent(text: str) -> None:
    """Takes what would be printed."""


def made(folder: Path, *steps: int) -> Path:
    """A run folder with complete checkpoints of these steps, the last of them the newest save."""
    for step in steps:
        with files.atomic_directory(folder / f"checkpoint_step_{step}") as inside:
            (inside / STATE).write_text(json.dumps({"format_version": 1, "step": step}))
    point_last(folder, folder / f"checkpoint_step_{steps[-1]}")
    return folder


def steps_in(folder: Path) -> list[int]:
    return [saved.step for saved in list_checkpoints(folder)]


@pytest.mark.parametrize(
    ("keep", "best", "expected"),
    [
        (CheckpointSection(keep_last=2), None, [50, 60]),
        (CheckpointSection(keep_last=1), None, [60]),
        (CheckpointSection(keep_last=1, keep_every=20), None, [20, 40, 60]),
        (CheckpointSection(keep_last=1, keep_best=True), 30, [30, 60]),
        (CheckpointSection(keep_last=1, keep_best=False), 30, [60]),
        (CheckpointSection(keep_last=9), None, [10, 20, 30, 40, 50, 60]),
    ],
    ids=["two", "one", "every 20th", "best", "best not asked for", "all"],
)
def test_pruning_keeps_what_the_rules_name(
    tmp_path: Path, keep: CheckpointSection, best: int | None, expected: list[int]
) -> None:
    folder = made(tmp_path, 10, 20, 30, 40, 50, 60)
    said: list[str] = []
    removed = prune(folder, keep, best, said.append)
    assert steps_in(folder) == expected
    assert [path.name in text for path, text in zip(removed, said, strict=True)] == [True] * (6 - len(expected))


@settings(max_examples=30, deadline=None)
@given(
    st.sets(st.integers(1, 30), min_size=1, max_size=8),
    st.sets(st.integers(1, 30)),
    st.integers(1, 3),
    st.integers(0, 7),
    st.data(),
)
def test_pruning_never_removes_the_newest_complete_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    steps: set[int],
    hurt: set[int],
    keep_last: int,
    keep_every: int,
    data: st.DataObject,
) -> None:
    newest = data.draw(
        st.sampled_from(sorted(steps))
    )  # a save at any step; beyond it only damaged ones that the run resumed before
    folder = made(tmp_path_factory.mktemp("run"), *sorted(steps - {newest}), newest)
    for step in (hurt & steps) - {newest} | {step for step in steps if step > newest}:
        (folder / f"checkpoint_step_{step}" / STATE).unlink()
    prune(folder, CheckpointSection(keep_last=keep_last, keep_every=keep_every), None, silent)
    found = newest_complete(folder, silent)
    assert found is not None
    assert found.step == newest
    shutil.rmtree(folder)


def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(tmp_path: Path) -> None:
    folder = made(tmp_path, 10, 30, 20)  # 30 was damaged, the run resumed at 10 and has just saved 20
    (folder / "checkpoint_step_30" / STATE).write_text("{}")
    prune(folder, CheckpointSection(keep_last=2), None, silent)
    assert steps_in(folder) == [10, 20, 30]
    prune(made(tmp_path / "later", 10, 20, 30, 40), CheckpointSection(keep_last=2), None, silent)
    assert steps_in(tmp_path / "later") == [30, 40]


def test_a_deletion_that_is_cut_short_leaves_a_folder_that_says_it_is_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path, 10, 20)

    def cut(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            prune(folder, CheckpointSection(keep_last=1), None, silent)
    assert files.verify_directory(folder / "checkpoint_step_10") != []
    assert files.verify_directory(folder / "checkpoint_step_20") == []


@pytest.mark.parametrize(
    "target", [None, "checkpoint_step_10", "checkpoint_step_99"], ids=["absent", "older", "dangling"]
)
def test_the_start_repairs_where_checkpoint_last_points(tmp_path: Path, target: str | None) -> None:
    folder = made(tmp_path, 10, 20)
    (folder / LAST).unlink()
    if target:
        (folder / LAST).symlink_to(target)
    clean_leftovers(folder, silent)
    assert (folder / LAST).resolve().name == "checkpoint_step_20"


def test_a_link_left_by_a_killed_save_does_not_stop_the_next_start(tmp_path: Path) -> None:
    folder = made(tmp_path, 10)
    (folder / f"{files.TEMPORARY}{LAST}").symlink_to("checkpoint_step_10")
    clean_leftovers(folder, silent)
    assert sorted(path.name for path in folder.iterdir()) == [LAST, "checkpoint_step_10"]


def damage_flip(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def damage_truncate(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def damage_delete(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()


def damage_hash_list(folder: Path) -> None:
    files.hash_list_of(folder).unlink()


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_delete, damage_hash_list])
def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(
    nano: Nano, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    recipe = nano(**{"checkpoint.sample_prompt": ""})
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "cut", stop_after_step=8)
    damage(tmp_path / "cut" / "checkpoint_step_8")
    capfd.readouterr()
    run(recipe, tmp_path / "cut")
    said = capfd.readouterr().err
    assert "passing over" in said
    assert "checkpoint_step_4 at step 4" in said
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert stored(tmp_path / "cut" / LAST) == stored(tmp_path / "whole" / LAST)


def test_resume_from_a_damaged_checkpoint_is_refused_with_the_file_named(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "first", stop_after_step=4)
    damage_truncate(tmp_path / "first" / "checkpoint_step_4")
    with pytest.raises(InputError, match=r"damaged.*safetensors"):
        run(nano(), tmp_path / "second", resume_from=tmp_path / "first" / "checkpoint_step_4")


def test_a_checkpoint_of_another_model_is_refused_with_the_field(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "first", stop_after_step=4)
    other = nano(**{"model.hidden_size": "48"})
    with pytest.raises(InputError, match=r"model\.hidden_size: found 48, but the weights .* have 32"):
        run(other, tmp_path / "second", resume_from=tmp_path / "first" / "checkpoint_step_4")


def test_tensors_of_another_shape_are_refused_with_both_shapes(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "first", stop_after_step=4)
    saved, name = tmp_path / "first" / "checkpoint_step_4", "model.model.embed_tokens.weight"
    tensors = {**read_checkpoint_tensors(saved), name: torch.empty(512, 48)}
    with pytest.raises(
        InputError, match=rf"not a checkpoint of this model.*{name} is \(512, 32\), expected \(512, 48\)"
    ):
        load_tensors(saved, tensors, Mesh(torch.device("cpu")))


def test_a_checkpoint_of_another_optimizer_is_refused_and_not_restored_in_part(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "first", stop_after_step=4)
    with pytest.raises(InputError, match=r"not a checkpoint of this model and optimizer.*momentum"):
        run(nano(**{"optim.name": "muon"}), tmp_path / "second", resume_from=tmp_path / "first" / "checkpoint_step_4")


@pytest.mark.parametrize("version", [2, 0, None, "1"])
def test_a_checkpoint_of_another_format_version_is_refused_by_version(tmp_path: Path, version: object) -> None:
    (tmp_path / STATE).write_text(json.dumps({"format_version": version, "step": 1}))
    with pytest.raises(InputError, match="format version"):
        read_state(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an argonne checkpoint"):
        read_state(tmp_path)


STORED = Path(__file__).parent / "stored_version_1"


def test_a_stored_checkpoint_of_format_version_1_resumes_to_the_curve_stored_beside_it(tmp_path: Path) -> None:
    """Written once and never again: every later version of the package has to read it."""
    assert files.verify_directory(STORED / "checkpoint_step_3") == []
    state = read_state(STORED / "checkpoint_step_3")
    assert (state["format_version"], state["step"], state["tokens"], state["samples"]) == (1, 3, 192, 12)
    source = f"[{{ path = {json.dumps(str(STORED / 'tokens'))}, max_epochs = 9 }}]"
    recipe = load_recipe(str(STORED / "checkpoint_step_3" / "recipe.toml"), {"data.sources": source})
    assert run(recipe, tmp_path / "run", resume_from=STORED / "checkpoint_step_3").outcome.complete
    expected = json.loads((STORED / "steps_after.json").read_text())
    assert [record["step"] for record in expected] == [4, 5, 6]
    for found, wanted in zip(curve(tmp_path / "run"), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)


def test_a_stored_checkpoint_of_format_version_1_is_a_model(tmp_path: Path) -> None:
    loaded = load_model(STORED / "checkpoint_step_3")
    logits = loaded.model(torch.arange(8)[None]).logits
    assert logits.shape == (1, 8, 300)
    assert bool(torch.isfinite(logits).all())


def test_a_run_lives_in_a_folder_without_links(nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **named: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    recipe = nano(**{"checkpoint.sample_prompt": ""})
    run(recipe, tmp_path / "whole")
    monkeypatch.setattr(os, "symlink", refused)
    monkeypatch.setattr(os, "link", refused)
    run(recipe, tmp_path / "run", stop_after_step=8)
    assert (tmp_path / "run" / LAST).read_text() == "checkpoint_step_8\n"
    assert load_model(tmp_path / "run").folder.name == "checkpoint_step_8"
    run(recipe, tmp_path / "run")
    assert stored(last_checkpoint(tmp_path / "run") or tmp_path) == stored(tmp_path / "whole" / LAST)
    branch = run(recipe, tmp_path / "branch", resume_from=tmp_path / "run" / LAST)
    assert branch.outcome.complete


@pytest.mark.parametrize("missing", [False, True])
def test_a_copy_that_followed_the_link_resumes(nano: Nano, tmp_path: Path, missing: bool) -> None:
    recipe = nano(**{"checkpoint.sample_prompt": ""})
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "run", stop_after_step=8)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=False)
    assert not (tmp_path / "copy" / LAST).is_symlink()
    if missing:
        shutil.rmtree(tmp_path / "copy" / "checkpoint_step_8")
    run(recipe, tmp_path / "copy")
    assert (tmp_path / "copy" / LAST).resolve().name == "checkpoint_step_12"
    assert stored(tmp_path / "copy" / LAST) == stored(tmp_path / "whole" / LAST)
