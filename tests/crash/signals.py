"""Sends requests to stop to a real command at random moments, and looks at what they leave."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from argonne.config import Recipe
from argonne.errors import REQUESTS
from argonne.layout import COMPLETE, LOCK, MANIFEST, STOPPED
from argonne.recipe import to_toml
from tests.crash.conftest import Mother
from tests.crash.killing import Watcher

PHASES = ("start-up", "training", "evaluation", "sampling", "save")
TARGETS = ("launcher", "worker", "group")
EARLY = (1, *(-number for number in REQUESTS))  # before the command listens: as any process ends
STARTING = {1: 0.8, 2: 9.0}  # seconds until the first step, at most
GONE_SECONDS = 10.0


@dataclass
class Signals:
    """What a campaign did: exit codes by phase, and the longest time from a request to the end of the command."""

    codes: Counter[tuple[str, int]] = field(default_factory=Counter)
    longest: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.codes.values())


def stop_until_complete(
    mother: Mother, recipe: Recipe, run: Path, *, signals: int, seed: int, ranks: int, file: Path
) -> Signals:
    """Send `signals` requests, one a session, spread over signal, target and phase; the run is resumed each time."""
    draw, done = random.Random(seed), Signals()
    file.write_text(to_toml(recipe))
    cases = itertools.cycle(draw.sample([*itertools.product(REQUESTS, TARGETS, PHASES)], k=60))
    log = run.parent / f"{run.name}.log"
    while done.total < signals:
        assert not (run / COMPLETE).exists(), f"complete after {done}: the run was too short for that many requests"
        number, target, phase = next(cases)
        before = _state(run)
        pid = mother.command(["pretrain", str(file), "--run", str(run)], log)
        reached = _wait_for(phase, Watcher(run, [pid]), recipe, run, draw, ranks)
        began = time.monotonic()
        if reached:
            _send(pid, number, target, draw)
        (code,) = mother.wait()
        if not reached:
            continue
        done.longest = max(done.longest, time.monotonic() - began)
        done.codes[(phase, code)] += 1
        told = f"{number.name} to the {target} in {phase} with {ranks} ranks: exit code {code}\n{_tail(log)}"
        if phase == "start-up" and code in EARLY:
            assert _state(run) == before, told
        else:
            complete = (run / COMPLETE).exists()
            assert code == (0 if complete else 3), told
            assert complete or (run / STOPPED).exists() or not (run / MANIFEST).exists(), told
        assert code in EARLY or not (run / LOCK).exists(), told
        assert gone(pid), f"{told}\nstill running: {_session(pid)}"
    return done


def _state(run: Path) -> list[str]:
    """Checkpoints and markers: what a session that never began leaves as it was."""
    return sorted(
        path.name for path in run.glob("*") if path.name.startswith("checkpoint_step_") or path.name == STOPPED
    )


def _wait_for(phase: str, watcher: Watcher, recipe: Recipe, run: Path, draw: random.Random, ranks: int) -> bool:
    """Return in the middle of the phase; False where the session ended before."""
    saved = max((int(name.rpartition("_")[2]) for name in _state(run) if name != STOPPED), default=0)
    if phase == "start-up":
        end = time.monotonic() + draw.uniform(0.1, STARTING[ranks])
        # A machine may be faster than that: the first step is where it ends.
        return watcher.wait_until(lambda: time.monotonic() >= end or bool(watcher.records()))
    step = saved + draw.randint(1, 3)
    if phase == "training":
        reached = watcher.wait_for_step(step)
    elif phase == "evaluation":
        every = recipe.eval.every_steps
        reached = watcher.wait_for_step(step + -step % every)
    else:
        every = recipe.checkpoint.every_steps
        step += -step % every
        reached = watcher.wait_for_saved(step) if phase == "sampling" else watcher.wait_for_save(step - 1)
    time.sleep(draw.uniform(0, 0.05))
    return reached


def _send(pid: int, number: signal.Signals, target: str, draw: random.Random) -> None:
    workers = _workers(pid)
    time.sleep(0.02)
    workers &= _workers(pid)
    if target == "group":
        os.killpg(pid, number)
    else:
        os.kill(draw.choice(sorted(workers)) if target == "worker" and workers else pid, number)


def _workers(pid: int) -> set[int]:
    """Workers of a launcher: children of its fork server, under the server's own command line. What a library runs for
    a moment while it is imported looks like one until it has another program, 20 ms later at most: nobody to ask.
    """
    found = {one for one in _session(pid) if one != pid and _parent(one) != pid == _parent(_parent(one))}
    return {one for one in found if b"forkserver" in _command_line(one)}


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _session(pid: int) -> list[int]:
    """The processes of the session that `pid` leads, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == pid and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def gone(pid: int) -> bool:
    """Does nothing of the session run any more? Servers of multiprocessing end a moment after their last client."""
    end = time.monotonic() + GONE_SECONDS
    while _session(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _tail(log: Path) -> str:
    return log.read_text()[-3000:] if log.exists() else ""
