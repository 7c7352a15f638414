"""Kills a run in each phase of its life; in which one a victim died is told by what it left behind."""

from __future__ import annotations

import math
import os
import random
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argonne.config import Recipe
from argonne.data.pair_data import REFERENCES
from argonne.data.rendered import RENDERED
from argonne.layout import COMPLETE, CONVERSATIONS
from argonne.train.checkpoint import list_checkpoints
from tests.crash.conftest import Mother
from tests.crash.killing import Watcher, _wait_a_moment, sealed_units
from tests.crash.plants import SCORING

# With the longest time from what is waited for to the kill.
PHASES = {"steps": 0.02, "saves": 0.06, "evaluation": 0.003, "sampling": 0.03, "an epoch's end": 0.003}


def epoch_ends(records: Sequence[dict[str, Any]]) -> list[int]:
    """The steps of a run on one source within which an epoch ends, from its records."""
    passes = {record["step"]: next(iter(record["sources"].values()))["passes"] for record in records}
    return [step for step, done in passes.items() if math.floor(done) > math.floor(passes.get(step - 1, 0.0))]


def kill_while_rendering(
    mother: Mother, recipe: Recipe, run: Path, *, kills: int, seed: int, ranks: int = 1, **options: Any
) -> dict[str, list[tuple[int, int]]]:
    """Kill a run `kills` times before its conversations are rendered; returns the units that were sealed by then, none
    of them made again.
    """
    draw = random.Random(seed)
    sealed = sealed_units(run)
    for number in range(kills):
        pids = mother.start(recipe, run, ranks=ranks, **options)
        wanted = len(sealed) + draw.randint(1, 2)
        assert Watcher(run, pids).wait_for_units(wanted), f"{wanted} units are more than there are"
        _kill(mother, pids, run, draw)
        assert not list((run / CONVERSATIONS).glob(f"*/{RENDERED}")), f"rendered before kill {number + 1}"
        now = sealed_units(run)
        assert len(now) > len(sealed)
        assert {name: now[name] for name in sealed} == sealed
        sealed = now
    return sealed


def kill_while_scoring(
    mother: Mother, recipe: Recipe, run: Path, *, kills: int, passes: int, seed: int, ranks: int = 1, **options: Any
) -> None:
    """Kill a run `kills` times among the `passes` of its reference over the pairs: nothing of the scores is there yet,
    and no step was made.
    """
    draw, log = random.Random(seed), run.parent / f"{run.name}.log"
    for number in range(kills):
        before = passes_of(log)
        pids = mother.start(recipe, run, ranks=ranks, **options)
        watcher, wanted = Watcher(run, pids), before + draw.randint(1, passes - ranks)
        assert watcher.wait_until(lambda: passes_of(log) >= wanted), log.read_text()[-4000:]  # noqa: B023
        codes = _kill(mother, pids, run, draw)
        assert set(codes) == {-signal.SIGKILL}
        assert before < passes_of(log) < before + passes, f"kill {number + 1} came after the pass"
        kept = [path.name for path in (run / CONVERSATIONS / REFERENCES).iterdir() if path.name != ".lock"]
        assert not kept, f"kill {number + 1} came after the pass: {kept}"
        assert not any(record["event"] == "step" for record in watcher.records())


def passes_of(log: Path) -> int:
    """Forward passes of references that a run's sessions have begun, from its log."""
    return log.read_text().count(SCORING) if log.exists() else 0


def kill_in_each_phase(
    mother: Mother,
    recipe: Recipe,
    run: Path,
    *,
    each: int,
    ends: Sequence[int],
    seed: int,
    ranks: int = 1,
    **options: Any,
) -> Counter[str]:
    """Kill `run` until at least `each` victims have died in each phase; how many did, with all of them as "kills".
    `ends`: the steps within which epochs end.
    """
    draw, died = random.Random(seed), Counter[str]()
    while missing := [phase for phase in PHASES if died[phase] < each]:
        assert not (run / COMPLETE).exists(), f"complete after {died}: the run was too short for that many kills"
        assert died["kills"] < 10 * each * len(PHASES), f"{missing} are not met: {died}"
        phase = draw.choice(missing)
        saved = max((found.step for found in list_checkpoints(run)), default=0)
        pids = mother.start(recipe, run, ranks=ranks, **options)
        watcher = Watcher(run, pids)
        if _reached(phase, watcher, recipe, saved, ends, draw):
            _wait_a_moment(draw, PHASES[phase])
            codes = _kill(mother, pids, run, draw)
        else:
            codes = mother.wait()
        if -signal.SIGKILL in codes:
            died.update(["kills", *_phases_of_death(watcher, recipe, ends)])
    return died


def _kill(mother: Mother, pids: list[int], run: Path, draw: random.Random) -> list[int]:
    """`kill -9` to all ranks, to one of them first."""
    os.kill(draw.choice(pids), signal.SIGKILL)
    codes = mother.kill()
    assert 1 not in codes, (run.parent / f"{run.name}.log").read_text()[-4000:]
    return codes


def _reached(
    phase: str, watcher: Watcher, recipe: Recipe, saved: int, ends: Sequence[int], draw: random.Random
) -> bool:
    """Return in the phase, or just before it; False where the session ended before."""
    if phase == "steps":
        rhythms = recipe.eval.every_steps, recipe.checkpoint.every_steps
        plain = [step for step in range(saved + 1, saved + 9) if all(step % every for every in rhythms)]
        return watcher.wait_for_step(draw.choice(plain[:2]))
    if phase == "evaluation":
        return watcher.wait_for_step(_next(saved, recipe.eval.every_steps))
    if phase == "saves":
        return watcher.wait_for_save(saved)
    if phase == "sampling":
        return watcher.wait_for_saved(_next(saved, recipe.checkpoint.every_steps))
    end = next((end for end in ends if end > saved), None)
    assert end is not None, f"no epoch ends after step {saved}"
    return watcher.wait_for_step(draw.randint(max(saved + 1, end - 1), end))


def _next(step: int, every: int) -> int:
    return (step // every + 1) * every


def _phases_of_death(watcher: Watcher, recipe: Recipe, ends: Sequence[int]) -> list[str]:
    records = watcher.records()
    if not records or records[-1]["event"] in ("start", "resume"):
        return ["start-up"]
    event, step = records[-1]["event"], records[-1]["step"]
    there = ["an epoch's end"] if step in ends or step + 1 in ends else []
    if watcher.saves_begun():
        return [*there, "saves"]
    if event == "checkpoint":
        return [*there, "sampling"]
    if event == "step" and step % recipe.eval.every_steps == 0:
        return [*there, "evaluation"]
    return [*there, "steps"]
