"""Threads of a CPU beside other work.

Between two parallel regions OpenMP's threads spin: soonest done where the cores are theirs, but where they are not,
they hold the cores that they wait for. Training beside one busy process took three to twenty times as long. libgomp
itself lets its threads sleep once it manages more of them than there are cores. So while threads of this process wait
for a core, idle teams are held that make it so. No number changes: a team has as many threads as before.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

LOOK_SECONDS = 1.0
# Seconds that all threads together waited for a core in a second: from where they sleep, and until when.
CROWDED, CALM = 0.25, 0.1
CALM_LOOKS = 3  # in a row, before they spin again
TOLD_AGAIN_SECONDS = 600
TASKS = Path("/proc/self/task")
STATISTICS = Path("/proc/stat")


class Crowd:
    """Whether the cores are crowded, from what is seen in one second after the other."""

    def __init__(self) -> None:
        self.crowded, self._calm = False, 0

    def seen(self, waited: float) -> bool:
        """waited: seconds of waiting a second, of all threads together. Returns whether this changed."""
        before = self.crowded
        self._calm = 0 if waited > CALM else self._calm + 1
        self.crowded = waited > CROWDED or (self.crowded and self._calm < CALM_LOOKS)
        return self.crowded != before


class Waiting:
    """Seconds for which the threads of this process were ready to run and another ran instead (Linux tells it)."""

    def __init__(self) -> None:
        self._before, self._at = self._read(), time.monotonic()

    def since_last(self) -> float:
        """A second, since the last look; of the threads that were there then."""
        now, at = self._read(), time.monotonic()
        waited = sum(now[thread] - self._before[thread] for thread in now.keys() & self._before.keys())
        seconds, self._before, self._at = at - self._at, now, at
        return waited / 1e9 / max(seconds, 1e-3)

    @staticmethod
    def _read() -> dict[str, int]:
        found = {}
        for task in TASKS.iterdir():
            try:
                found[task.name] = int((task / "schedstat").read_text().split()[1])
            except (OSError, IndexError):  # it ended meanwhile
                continue
        return found


def used_by_others() -> float:
    """Seconds that others have used the cores of this process since the machine started."""
    ticks, busy = os.sysconf("SC_CLK_TCK"), 0
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    for line in STATISTICS.read_text().splitlines():
        name, *fields = line.split()
        if name in mine:
            counts = [int(field) for field in fields]
            busy += sum(counts[:3]) + sum(counts[5:8])  # all but idle, and waiting for a disk
    own = os.times()
    return busy / ticks - own.user - own.system - own.children_user - own.children_system


class IdleTeams:
    """Teams of OpenMP threads that do nothing, as many as make libgomp's threads more than the cores."""

    def __init__(self) -> None:
        self._leave = threading.Event()
        threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
        count = 1 + max(0, cores - threads) // (threads - 1)
        self._holders = [threading.Thread(target=self._hold, daemon=True) for _ in range(count)]
        for holder in self._holders:
            holder.start()

    def _hold(self) -> None:
        torch.ones(1 << 20).add_(1)  # a thread's first parallel region makes its team, which ends with the thread
        self._leave.wait()

    def close(self) -> None:
        self._leave.set()
        for holder in self._holders:
            holder.join()


def libgomp_spins() -> bool:
    """Does this process use libgomp, with several threads, and has nobody said how they shall wait?"""
    said = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ)
    if said or torch.get_num_threads() < 2 or not (TASKS / str(os.getpid()) / "schedstat").exists():
        return False
    return "libgomp" in Path("/proc/self/maps").read_text()


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def beside_others(tell: Callable[[str], None] = _to_stderr) -> Iterator[None]:
    """While the block runs, look each second whether other processes take cores from this one's threads; those then
    sleep where they wait, until the machine is calm. Told where others are the cause.
    """
    if not libgomp_spins():
        yield
        return
    end = threading.Event()
    watcher = threading.Thread(target=_watch, args=(end, tell), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        end.set()
        watcher.join()


def _watch(end: threading.Event, tell: Callable[[str], None]) -> None:
    crowd, waiting, teams, told = Crowd(), Waiting(), None, -float(TOLD_AGAIN_SECONDS)
    others, at = used_by_others(), time.monotonic()
    while not end.wait(LOOK_SECONDS):
        changed = crowd.seen(waiting.since_last())
        before, since, others, at = others, at, used_by_others(), time.monotonic()
        if not changed:
            continue
        if not crowd.crowded:
            assert teams is not None
            teams.close()
            teams = None
            continue
        teams = IdleTeams()
        taken, cores = (others - before) / (at - since), len(os.sched_getaffinity(0))
        if taken > CROWDED and at - told > TOLD_AGAIN_SECONDS:
            told = at
            tell(
                f"warning: other processes use {taken:.1f} of this machine's {cores} cores, which slows this one down; "
                "end what is not needed, or take fewer threads (OMP_NUM_THREADS)"
            )
    if teams is not None:
        teams.close()
