"""Work beside training: held-out loss and samples. A failure there is told and survived, and a request to stop leaves
it at once.

Work is a generator that yields between forward passes. One rank drives it alone, in a thread with a time limit; or,
where a forward pass is a collective, all ranks drive it together and agree between the passes on going on, so that none
is left behind in one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from argonne.parallel.compile import eager_blocks
from argonne.parallel.mesh import Mesh
from argonne.train.guard import StopWatch

Result = TypeVar("Result")
Work = Generator[None, None, Result]


@dataclass(frozen=True)
class Sampled:
    """What the model wrote: `event` with `values` for metrics.jsonl, `page` for samples.md, `line` for the terminal."""

    event: str
    values: dict[str, Any]
    page: str
    line: str


class LeftBehind(Exception):
    """The work was left at a request to stop, or because another rank failed in it. The message says which."""


def beside(
    make: Callable[[], Work[Result]],
    model: nn.Module,
    mesh: Mesh,
    watch: StopWatch,
    seconds: float,
    *,
    together: bool,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Result:
    """The result of the work on `model` in eval mode, without gradients and uncompiled; mode and random generators are
    as before after it, since training draws its own seeds but a user's code may not. Raises as `drive_alone` and
    `drive_together` do.
    """

    def work() -> Work[Result]:
        with torch.no_grad(), autocast():
            return (yield from make())

    was_training = model.training
    model.eval()
    devices = [mesh.device] if mesh.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), eager_blocks(model):
        try:
            return drive_together(work, mesh, watch, seconds) if together else drive_alone(work, watch, seconds)
        finally:
            model.train(was_training)


def drive_alone(make: Callable[[], Work[Result]], watch: StopWatch, seconds: float) -> Result:
    """The result of the work, run beside this thread. Raises LeftBehind on a request to stop, TimeoutError, and what
    the work raises.
    """
    if (reason := watch.reason()) is not None:
        raise LeftBehind(reason)
    box: list[tuple[Result | None, Exception | None]] = []
    leave = threading.Event()

    def run() -> None:
        try:
            with closing(make()) as work:
                while not leave.is_set():
                    next(work)
        except StopIteration as end:
            box.append((end.value, None))
        except Exception as error:
            box.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="telemetry")
    thread.start()
    end = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < end and watch.reason() is None:
        thread.join(min(0.1, max(0.0, end - time.monotonic())))
    leave.set()  # a thread that is in the middle of a forward pass leaves after it
    if not box:
        if (reason := watch.reason()) is not None:
            raise LeftBehind(reason)
        raise TimeoutError(f"took longer than {seconds:g} s and was given up")
    value, error = box[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def drive_together(make: Callable[[], Work[Result]], mesh: Mesh, watch: StopWatch, seconds: float) -> Result:
    """The same on all ranks in step: between forward passes they agree on failure, time and requests to stop.

    Raises LeftBehind or TimeoutError on every rank where any has to leave; the rank that failed raises its own error.
    """
    end = time.monotonic() + seconds
    with closing(make()) as work:  # its contexts end here, not when the generator is collected
        while True:
            problem: Exception | None = None
            finished: list[Result] = []
            try:
                next(work)
            except StopIteration as found:
                finished.append(found.value)
            except Exception as error:
                problem = error
            asked = [problem is not None, watch.reason() is not None, time.monotonic() >= end]
            failed, stop, late = mesh.sum_later([int(flag) for flag in asked])()
            if problem is not None:
                raise problem
            if failed:
                raise LeftBehind("another rank failed in it")
            if finished:
                return finished[0]
            if stop:
                raise LeftBehind("asked to stop")
            if late:
                raise TimeoutError(f"took longer than {seconds:g} s and was given up")
