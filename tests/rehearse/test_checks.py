"""What is told of the real run without running anything."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from argonne.errors import InputError
from argonne.recipe import load_recipe
from argonne.rehearse.checks import Machine, bytes_needed, check_disk, check_run, real_recipe


def test_the_disk_must_take_what_all_runs_on_it_take_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need = bytes_needed(load_recipe("argonne-2.5-pretrain"))
    assert need == 1_273_807_360 * 4 * (3 * 3 + 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1.5 * need))
    check_disk([(tmp_path / "a", need)])
    with pytest.raises(InputError, match=r"84.1B bytes free, and checkpoints and exports will take 112B; make room"):
        check_disk([(tmp_path / "a", need), (tmp_path / "b", need)])


@pytest.mark.parametrize(
    ("told", "seconds", "words"),
    [
        ({"stop.deadline": "1000"}, None, "stop.deadline: ends the run 0 s after its start"),
        ({"stop.wall_time": "10m"}, None, "stop.wall_time: ends the run 600 s after its start, and its first save"),
        ({}, 900.0, r"--time: ends the run 900 s after its start, .* 1,800 s \(checkpoint.every_minutes\)"),
    ],
)
def test_the_first_save_comes_before_the_end_of_the_job(
    told: dict[str, str], seconds: float | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        check_run(load_recipe("nano-3.0", told), tmp_path / "run", Machine(seconds=seconds))


def test_a_deadline_without_saves_by_time_has_only_to_be_in_the_future(tmp_path: Path) -> None:
    told = {"checkpoint.every_minutes": "0", "stop.deadline": str(time.time() + 60)}
    check_run(load_recipe("nano-3.0", told), tmp_path / "run", Machine())
    with pytest.raises(InputError, match=r"stop\.deadline: has passed"):
        check_run(load_recipe("nano-3.0", {**told, "stop.deadline": "1000"}), tmp_path / "run", Machine())


def test_a_warmup_longer_than_the_real_run_is_found_though_the_small_one_has_a_short_one(tmp_path: Path) -> None:
    told = {"train.steps": "none", "train.tokens": "40960", "schedule.warmup": "20"}
    with pytest.raises(InputError, match=r"schedule\.warmup: found 20 steps, more than the run's 10"):
        check_run(load_recipe("nano-3.0", told), tmp_path / "run", Machine())


def test_a_card_that_is_too_small_is_told_in_the_words_of_the_plan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the run will be refused: memory: a step is planned with"):
        check_run(load_recipe("argonne-3.0-pretrain"), tmp_path / "run", Machine(gpus=1, gpu="l4"))


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--run .*: cannot be written \(.*file is a file\)"):
        check_run(load_recipe("nano-3.0"), tmp_path / "file" / "run", Machine())


def test_sizes_that_contradict_the_former_run_are_found_at_their_real_size() -> None:
    former = real_recipe(load_recipe("nano-3.0"), None)
    with pytest.raises(InputError, match=r"model\.hidden_size: found 256, but the weights .* have 128"):
        real_recipe(load_recipe("nano-3.0-sft", {"model.hidden_size": "256"}), former)
    assert real_recipe(load_recipe("nano-3.0-midtrain"), former).model.max_position_embeddings == 1024
