"""Work beside training: given up in time, left on request, and by all ranks together where a forward pass is a
collective.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from argonne.config import StopSection
from argonne.parallel.mesh import Mesh
from argonne.train.aside import LeftBehind, Work, drive_alone, drive_together
from argonne.train.guard import StopWatch

ALONE = Mesh(torch.device("cpu"))


def counting(passes: int, done: list[int] | None = None) -> Callable[[], Work[str]]:
    def work() -> Work[str]:
        for number in range(passes):
            if done is not None:
                done.append(number)
            yield
        return f"{passes} passes"

    return work


def watch() -> StopWatch:
    return StopWatch(StopSection())


class Others:
    """A mesh on which another rank raises a flag at the given turn: 0 = it failed, 1 = it was asked to stop, 2 = its
    time is over.
    """

    def __init__(self, flag: int, turn: int) -> None:
        self.flag, self.turn, self.turns = flag, turn, 0

    def sum_later(self, mine: list[int]) -> Callable[[], list[int]]:
        self.turns += 1
        theirs = [int(self.turns == self.turn and number == self.flag) for number in range(3)]
        return lambda: [left + right for left, right in zip(mine, theirs, strict=True)]


@pytest.mark.parametrize("drive", [drive_alone, lambda work, stop, limit: drive_together(work, ALONE, stop, limit)])
def test_work_that_ends_gives_its_result_and_what_it_raises_is_raised(drive: Any) -> None:
    assert drive(counting(3), watch(), 60.0) == "3 passes"

    def fails() -> Work[str]:
        yield
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        drive(fails, watch(), 60.0)


@pytest.mark.parametrize("drive", [drive_alone, lambda work, stop, limit: drive_together(work, ALONE, stop, limit)])
def test_a_request_to_stop_leaves_the_work_between_two_passes(drive: Any) -> None:
    asked, done = watch(), list[int]()

    def work() -> Work[str]:
        yield from counting(2, done)()
        asked.request("SIGTERM")
        yield from counting(1_000_000, done)()
        return "never"

    with pytest.raises(LeftBehind):
        drive(work, asked, 60.0)
    assert len(done) < 1_000_000


def test_work_that_hangs_is_given_up_alone_and_its_thread_ends_when_it_can() -> None:
    release = threading.Event()

    def hangs() -> Work[str]:
        release.wait()
        yield
        return "late"

    with pytest.raises(TimeoutError, match=r"longer than 0\.05 s"):
        drive_alone(hangs, watch(), 0.05)
    release.set()
    for thread in threading.enumerate():
        if thread.name == "telemetry":
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("flag", "error"), [(0, LeftBehind), (1, LeftBehind), (2, TimeoutError)], ids=["failure", "stop", "time"]
)
def test_what_another_rank_must_leave_is_left_here_after_the_same_pass(flag: int, error: type[Exception]) -> None:
    done: list[int] = []
    others: Any = Others(flag, turn=3)
    with pytest.raises(error):
        drive_together(counting(10, done), others, watch(), 60.0)
    assert done == [0, 1, 2]


def test_no_thread_is_started_where_a_forward_pass_is_a_collective() -> None:
    seen: list[str] = []

    def work() -> Work[str]:
        seen.append(threading.current_thread().name)
        yield
        return ""

    drive_together(work, ALONE, watch(), 60.0)
    assert seen == [threading.current_thread().name]


def test_gradients_are_on_again_after_work_that_was_left_in_the_middle() -> None:
    def work() -> Work[str]:
        with torch.no_grad():
            yield
            yield
        return ""

    others: Any = Others(0, turn=1)
    with pytest.raises(LeftBehind):
        drive_together(work, others, watch(), 60.0)
    assert torch.is_grad_enabled()
