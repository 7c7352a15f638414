"""Threads beside other work: when they sleep, and that nothing else changes."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from argonne.parallel import neighbours
from argonne.parallel.neighbours import CALM, CALM_LOOKS, CROWDED, Crowd, IdleTeams, Waiting, beside_others

linux = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system tells no waiting")


@pytest.fixture
def two_threads() -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_the_cores_are_crowded_as_soon_as_threads_wait_and_calm_after_several_looks() -> None:
    crowd = Crowd()
    assert not crowd.seen(CROWDED / 2)
    assert not crowd.crowded
    assert crowd.seen(CROWDED * 2)
    assert crowd.crowded
    for _ in range(CALM_LOOKS - 1):
        assert not crowd.seen(CALM / 2)
    assert crowd.seen(CALM / 2)
    assert not crowd.crowded


def test_a_moment_of_calm_between_two_crowds_changes_nothing() -> None:
    crowd = Crowd()
    crowd.seen(1.0)
    for _ in range(5):
        assert not crowd.seen(0.0)
        assert not crowd.seen((CALM + CROWDED) / 2)
    assert crowd.crowded


@linux
def test_waiting_is_that_of_threads_that_are_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([{"1": 0, "2": 5}, {"1": 2_000_000_000, "3": 9_000_000_000}])
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(Waiting, "_read", staticmethod(lambda: next(readings)))
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: next(clock))
    assert Waiting().since_last() == pytest.approx(0.5)


@linux
def test_idle_teams_make_more_threads_than_cores_and_leave_none_behind(two_threads: int) -> None:
    torch.ones(1 << 20).add_(1)
    tasks = Path("/proc/self/task")
    before = {task.name for task in tasks.iterdir()}
    teams = IdleTeams()
    held = {task.name for task in tasks.iterdir()} - before
    assert threading.active_count() > 1
    teams.close()
    assert held
    end = time.monotonic() + 30
    while left := held & {
        task.name for task in tasks.iterdir()
    }:  # a team ends a moment after the thread it was made by
        assert time.monotonic() < end, left
        os.sched_yield()


@linux
def test_numbers_do_not_change_while_teams_are_held(two_threads: int) -> None:
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    alone = (x @ x).softmax(-1).sum(0)
    teams = IdleTeams()
    beside = (x @ x).softmax(-1).sum(0)
    teams.close()
    assert torch.equal(alone, beside)


@linux
def test_a_crowd_is_told_once_with_the_cores_that_others_take(
    two_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three looks: crowded, calm, crowded again."""
    told: list[str] = []
    waits = iter([1.0, *[0.0] * CALM_LOOKS, 1.0])
    used = iter(range(100))
    done = threading.Event()

    def waited(self: Waiting) -> float:
        try:
            return next(waits)
        except StopIteration:
            done.set()
            return 0.0

    monkeypatch.setattr(neighbours, "libgomp_spins", lambda: True)
    monkeypatch.setattr(neighbours, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(Waiting, "since_last", waited)
    monkeypatch.setattr(neighbours, "used_by_others", lambda: float(next(used)))
    with beside_others(told.append):
        assert done.wait(30)
    assert len(told) == 1
    assert "other processes use" in told[0]


@pytest.mark.parametrize("variable", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_whoever_says_how_threads_wait_is_left_alone(
    two_threads: int, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    before = threading.active_count()
    with beside_others():
        assert threading.active_count() == before


def test_one_thread_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    before = threading.active_count()
    with beside_others():
        assert threading.active_count() == before
