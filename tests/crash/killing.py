"""Kills a run at random moments, in and outside saves, and resumes it until it is complete."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.config import Recipe
from argonne.files import TEMPORARY
from argonne.layout import CONVERSATIONS
from tests.crash.conftest import Mother

SAVING = f"{TEMPORARY}checkpoint_step_"
POLL_SECONDS = 0.0005


@dataclass
class Kills:
    """What a campaign did, counted from what the dead left behind."""

    total: int = 0
    inside_saves: int = 0
    sessions: int = 0


def sealed_units(run: Path) -> dict[str, list[tuple[int, int]]]:
    """Inode and time of change of each file of each rendered unit of conversations: other ones if it is made again."""
    units = (run / CONVERSATIONS).glob("*/unit-*")
    return {
        unit.name: [(stat.st_ino, stat.st_mtime_ns) for stat in (path.stat() for path in sorted(unit.iterdir()))]
        for unit in units
    }


class Watcher:
    """Sees the steps and saves of one session as they happen. `ended` tells that the session is over."""

    def __init__(self, run: Path, pids: list[int]) -> None:
        self._metrics, self._run, self._pids = run / "metrics.jsonl", run, pids
        self._left = set(run.glob(f"{SAVING}*"))  # by the dead: collected once the session has begun
        self._begin = self._offset = self._metrics.stat().st_size if self._metrics.exists() else 0
        self._step = 0
        self._saved = 0

    def _ended(self) -> bool:
        return any(_state(pid) in "ZX" for pid in self._pids)

    def _newest_step(self) -> int:
        """The last step that this session has logged, 0 before the first."""
        if not self._metrics.exists():
            return 0
        with open(self._metrics, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data.rpartition(b"\n")[0]
        self._offset += len(whole)
        for line in whole.splitlines():
            if b'"event": "step"' in line:
                self._step = int(json.loads(line)["step"])
            if b'"event": "checkpoint"' in line:
                self._saved = int(json.loads(line)["step"])
        return self._step

    def saves_begun(self) -> list[int]:
        """Steps of this session's saves that have begun and are not complete: their temporary folder is there."""
        names = (path.name for path in self._run.glob(f"{SAVING}*") if path not in self._left)
        return sorted(int(name.removeprefix(SAVING).split("-")[0]) for name in names)

    def records(self) -> list[dict[str, Any]]:
        """What this session has recorded; a line that a kill has cut is left out."""
        if not self._metrics.exists():
            return []
        whole = self._metrics.read_bytes()[self._begin :].rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line]

    def wait_until(self, seen: Callable[[], bool]) -> bool:
        """Return once it is `seen`; False when the session ended before."""
        while not seen():
            if self._ended():
                return False
            time.sleep(POLL_SECONDS)
        return True

    def wait_for_step(self, step: int) -> bool:
        """Return once `step` is logged; False when the session ended before."""
        return self.wait_until(lambda: self._newest_step() >= step)

    def wait_for_saved(self, step: int) -> bool:
        """Return once a save of `step` or later is recorded; False when the session ended before."""
        return self.wait_until(lambda: bool(self._newest_step() and self._saved >= step))

    def wait_for_save(self, after: int) -> bool:
        """Return once a save beyond step `after` has begun; False when the session ended before."""
        return self.wait_until(lambda: any(step > after for step in self.saves_begun()))

    def wait_for_units(self, count: int) -> bool:
        """Return once `count` units of conversations are rendered; False when the session ended before."""
        return self.wait_until(lambda: len(sealed_units(self._run)) >= count)


def _state(pid: int) -> str:
    """The process state letter of /proc: Z for one that has ended and is not yet waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def kill_until_complete(
    mother: Mother, recipe: Recipe, run: Path, *, kills: int, inside_saves: int, seed: int, ranks: int = 1
) -> Kills:
    """Kill `run` at least `kills` times after step 1, at least `inside_saves` of them inside a save, then let it
    finish.

    The next victim dies at a step drawn so that the wanted kills spread over what is left of the run.
    """
    draw, done = random.Random(seed), Kills()
    steps = recipe.train.steps or 0
    while done.total < kills or done.inside_saves < inside_saves:
        saved = max((int(path.name.rpartition("_")[2]) for path in run.glob("checkpoint_step_*")), default=0)
        assert not (run / "COMPLETE").exists(), f"complete after {done}: the run was too short for that many kills"
        wanted = max(1, kills - done.total)
        target = draw.randint(saved + 1, min(steps - 1, saved + 1 + 2 * (steps - saved) // wanted))
        in_save = draw.random() < 0.5 or wanted <= inside_saves - done.inside_saves
        pids = mother.start(recipe, run, ranks=ranks)
        done.sessions += 1
        watcher = Watcher(run, pids)
        reached = watcher.wait_for_save(target - 1) if in_save else watcher.wait_for_step(target)
        if reached:
            _wait_a_moment(draw, 0.06 if in_save else 0.02)
            if draw.random() < 0.5:
                pids = pids[::-1]  # on several ranks, another one dies first
            os.kill(pids[0], signal.SIGKILL)
        codes = mother.kill()
        assert 1 not in codes, (run.parent / f"{run.name}.log").read_text()[-4000:]
        if -signal.SIGKILL in codes:
            done.total += 1
            done.inside_saves += bool(watcher.saves_begun())
    return done


def _wait_a_moment(draw: random.Random, longest: float) -> None:
    time.sleep(draw.uniform(0, longest))
