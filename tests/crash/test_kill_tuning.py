"""A fine-tuning run killed with `kill -9` in each phase of its life, from the rendering of its conversations on, is the
run that was never touched: bit for bit, and with nothing rendered twice.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from argonne.config import Recipe
from argonne.files import TEMPORARY
from argonne.layout import CONVERSATIONS
from argonne.report.records import read_metrics
from argonne.train.checkpoint import LAST
from tests.crash.conftest import Mother
from tests.crash.faults import EXIT_CODE
from tests.crash.killing import Watcher, sealed_units
from tests.crash.phases import epoch_ends, kill_in_each_phase, kill_while_rendering, kill_while_scoring, passes_of
from tests.parallel.test_data_parallel import assert_close
from tests.train.helpers import curve, stored
from tests.tuning import conversations, pairs, write

Chat = Callable[..., Recipe]
Finish = Callable[..., None]
SMALL, SMALL_PASSES = "small_units_and_blocks", "small_units_blocks_and_passes"
SHORT, LONG = 32, 100  # steps
CONVERSATIONS_A_STEP = {"sft": 0.56, "cot-sft": 1.0, "dpo": 0.56}
FIRST_UNIT = f"{TEMPORARY}unit-00000"


SHOWN = {
    "checkpoint.sample_tokens": "16",
    "eval.every_steps": "5",
    "eval.windows": "16",
    "chat.hold_out": "0.1",
}
QUIET = {"checkpoint.sample_prompt": '""', "eval.windows": "0", "chat.hold_out": "0"}


def recipe_of(chat: Chat, folder: Path, stage: str, steps: int = SHORT, **overrides: str) -> Recipe:
    """A run of about eight epochs of several steps."""
    count = int(steps * CONVERSATIONS_A_STEP[stage])
    rows = pairs(count) if stage == "dpo" else conversations(count, think=stage == "cot-sft")
    source = write(folder / "source.jsonl", rows)
    given = {"train.steps": str(steps), "batch.micro": "2", "checkpoint.every_steps": "2"}
    return chat(f"nano-3.0-{stage}", source, **{**given, **overrides})


def assert_untouched(killed: Path, whole: Path) -> None:
    """Step, tokens, loss, gradient norm and rate of each step, every weight and moment, every byte that was rendered
    and packed.
    """
    assert curve(killed) == curve(whole)
    assert stored(killed / LAST) == stored(whole / LAST)
    assert stored(killed / "final_model") == stored(whole / "final_model")
    assert cached(killed) == cached(whole)


def cached(run: Path) -> dict[str, bytes]:
    files = (path for path in (run / CONVERSATIONS).rglob("*") if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def _campaign(
    mother: Mother, finish: Finish, recipe: Recipe, folder: Path, *, renderings: int, each: int, ranks: int
) -> None:
    whole, run, scorings = folder / "whole", folder / "killed", 0
    plant = SMALL_PASSES if recipe.stage == "dpo" else SMALL
    finish(recipe, whole, ranks=ranks, plant=plant)
    ends = epoch_ends(read_metrics(whole).of("step"))
    assert len(ends) >= 6
    sealed = kill_while_rendering(mother, recipe, run, kills=renderings, seed=ranks, ranks=ranks, plant=plant)
    if recipe.stage == "dpo":
        scorings, passes = each, passes_of(folder / "whole.log")
        assert passes > 10
        kill_while_scoring(mother, recipe, run, kills=scorings, passes=passes, seed=ranks, ranks=ranks, plant=plant)
    died = kill_in_each_phase(mother, recipe, run, each=each, ends=ends, seed=ranks, ranks=ranks, plant=plant)
    finish(recipe, run, ranks=ranks, plant=plant)
    print(
        f"{recipe.stage}, {ranks} ranks: {renderings} kills while rendering, {scorings} while the reference scores, "
        f"{died['kills']} later: {dict(died)}"
    )
    assert {name: sealed_units(run)[name] for name in sealed} == sealed
    assert_untouched(run, whole)


@pytest.mark.parametrize(("stage", "ranks"), [("sft", 1), ("cot-sft", 2), ("dpo", 2)])
def test_a_kill_in_each_phase_of_a_fine_tuning_run_leaves_no_trace(
    mother: Mother, finish: Finish, chat: Chat, tmp_path: Path, stage: str, ranks: int
) -> None:
    _campaign(mother, finish, recipe_of(chat, tmp_path, stage, **SHOWN), tmp_path, renderings=1, each=1, ranks=ranks)


@pytest.mark.campaign
@pytest.mark.parametrize("ranks", [1, 2], ids=["1 rank", "2 ranks"])
@pytest.mark.parametrize("stage", ["sft", "cot-sft", "dpo"])
def test_a_campaign_of_thirty_kills_of_a_fine_tuning_run_leaves_no_trace(
    mother: Mother, finish: Finish, chat: Chat, tmp_path: Path, stage: str, ranks: int
) -> None:
    _campaign(
        mother, finish, recipe_of(chat, tmp_path, stage, LONG, **SHOWN), tmp_path, renderings=5, each=7, ranks=ranks
    )


def _crash(mother: Mother, recipe: Recipe, run: Path, at: int, mode: str) -> str:
    """Die at operation `at` from the first unit on; returns what it was, "" where the first step came before."""
    report = run.parent / "operation"
    crash = {"at": at, "mode": mode, "report": str(report), "begin": FIRST_UNIT}
    mother.start(recipe, run, plant=SMALL, crash=crash, stop_after=1)
    (code,) = mother.wait()
    assert code in (3, EXIT_CODE), (run.parent / f"{run.name}.log").read_text()[-4000:]
    return report.read_text().strip() if code == EXIT_CODE or not at else ""


def _crash_and_go_on(mother: Mother, recipe: Recipe, folder: Path, operations: Sequence[int], mode: str) -> list[str]:
    """A fresh run for each of the operations, which dies there and is resumed to its first step; what they were."""
    visited = []
    for number in operations:
        run = folder / "crashed"
        visited.append(_crash(mother, recipe, run, number, mode))
        sealed = sealed_units(run)
        mother.start(recipe, run, plant=SMALL, stop_after=1)
        assert mother.wait() == [3], (folder / "crashed.log").read_text()[-4000:]
        told = f"operation {number}, {visited[-1]}"
        assert {name: sealed_units(run)[name] for name in sealed} == sealed, told
        assert cached(run) == cached(folder / "whole"), told
        assert curve(run) == curve(folder / "whole"), told
        shutil.rmtree(run)
    return visited


def _kinds(operations: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of the operations of each kind: what happens to which file, whatever its number."""
    kinds: dict[str, list[int]] = {}
    for number, operation in enumerate(operations, 1):
        kinds.setdefault(re.sub(r"-?[0-9a-f]{24,}|\d+", "#", operation), []).append(number)
    return kinds


PARTS = {"a unit is rendered": "unit-#", "the whole is closed": "ends|rendered", "rows are packed": "packed"}
REFERENCE = {"the reference's scores are kept": "reference"}


@pytest.mark.parametrize(("stage", "parts"), [("sft", PARTS), ("dpo", REFERENCE)])
def test_a_crash_before_the_first_step_renders_and_scores_nothing_twice(
    mother: Mother, chat: Chat, tmp_path: Path, stage: str, parts: dict[str, str]
) -> None:
    recipe = recipe_of(chat, tmp_path, stage, **QUIET)
    kinds = _kinds(_crash(mother, recipe, tmp_path / "whole", 0, "kill").splitlines())
    draw = random.Random(1)
    for part, pattern in parts.items():
        among = sorted(kind for kind in kinds if re.search(pattern, kind))
        chosen = [draw.choice(kinds[kind]) for kind in draw.sample(among, 2)]
        visited = _crash_and_go_on(mother, recipe, tmp_path, chosen, "kill")
        assert all(re.search(pattern.replace("#", ""), operation) for operation in visited), f"{part}: {visited}"


@pytest.mark.campaign
@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("mode", ["kill", "power cut"])
def test_a_crash_at_each_kind_of_operation_before_the_first_step_renders_nothing_twice(
    mother: Mother, chat: Chat, tmp_path: Path, mode: str, stage: str
) -> None:
    recipe = recipe_of(chat, tmp_path, stage, **QUIET)
    kinds = _kinds(_crash(mother, recipe, tmp_path / "whole", 0, mode).splitlines())
    draw = random.Random(2)
    chosen = [number for numbers in kinds.values() for number in draw.sample(numbers, min(3, len(numbers)))]
    visited = _crash_and_go_on(mother, recipe, tmp_path, sorted(chosen), mode)
    print(f"{len(visited)} operations of {len(kinds)} kinds visited")
    assert "" not in visited


def _batches(folder: Path) -> dict[int, dict[int, dict[str, np.ndarray]]]:
    """What was trained, by number of ranks and step: the arrays of all ranks after one another, where all of them came
    so far.
    """
    found: dict[int, dict[int, dict[str, np.ndarray]]] = {}
    for first in folder.glob("*-0.npz"):
        step, ranks, _ = map(int, first.stem.split("-"))
        parts = [folder / f"{step}-{ranks}-{rank}.npz" for rank in range(ranks)]
        if all(part.exists() for part in parts):
            loaded = [np.load(part) for part in parts]
            joined = {name: np.concatenate([part[name] for part in loaded]) for name in loaded[0].files}
            found.setdefault(ranks, {})[step] = joined
    return found


def _change_ranks(
    mother: Mother, finish: Finish, recipe: Recipe, folder: Path, sessions: Sequence[tuple[int, int]]
) -> None:
    """Kill a run in sessions of (so many ranks, at this step), finish it on two, and compare it with a run on one."""
    run, steps = folder / "killed", recipe.train.steps or 0
    for name in ("alone", "changing"):
        (folder / name).mkdir()
    finish(recipe, folder / "whole", plant=SMALL, record=str(folder / "alone"))
    changing = {"plant": SMALL, "record": str(folder / "changing")}
    for ranks, step in sessions:
        pids = mother.start(recipe, run, ranks=ranks, **changing)
        assert Watcher(run, pids).wait_for_step(step)
        assert set(mother.kill()) == {-signal.SIGKILL}
    finish(recipe, run, ranks=2, **changing)
    alone, found = _batches(folder / "alone")[1], _batches(folder / "changing")
    assert sorted(alone) == sorted(set().union(*found.values())) == list(range(steps))
    assert {ranks: len(batches) > 5 for ranks, batches in found.items()} == dict.fromkeys(dict(sessions), True)
    for ranks, batches in found.items():
        for step, arrays in batches.items():
            assert arrays.keys() == alone[step].keys()
            for name, values in arrays.items():
                assert np.array_equal(values, alone[step][name]), f"{name} of step {step} on {ranks} ranks"
    assert_close(curve(run), curve(folder / "whole"), 1e-6)


def test_another_number_of_ranks_after_each_kill_trains_the_same_batches(
    mother: Mother, finish: Finish, chat: Chat, tmp_path: Path
) -> None:
    _change_ranks(mother, finish, recipe_of(chat, tmp_path, "sft", **QUIET), tmp_path, [(2, 11), (1, 19)])


@pytest.mark.campaign
@pytest.mark.parametrize("reader", ["every-rank", "rank-0"])
@pytest.mark.parametrize("stage", ["sft", "cot-sft"])
def test_one_to_three_ranks_after_many_kills_train_the_same_batches(
    mother: Mother, finish: Finish, chat: Chat, tmp_path: Path, stage: str, reader: str
) -> None:
    """Three ranks have two rows, one and one."""
    recipe = recipe_of(chat, tmp_path, stage, LONG, **SHOWN, **{"data.reader": f'"{reader}"'})
    _change_ranks(mother, finish, recipe, tmp_path, [(2, 13), (3, 24), (1, 43), (3, 57), (2, 76)])
