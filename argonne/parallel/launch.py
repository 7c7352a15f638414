"""Local workers: torch's elastic agent inside this process, which starts, watches, restarts and signals them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch.distributed import DistError

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def run_workers(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    count: int,
    max_restarts: int,
    grace_seconds: float,
    name: str,
    preload: Sequence[str] = (),
) -> Any:
    """Run `work(*arguments)` on `count` local processes that can reach one another; returns rank 0's result.

    A worker that fails, dies or is killed ends the others, and all start again up to `max_restarts` times. SIGTERM,
    SIGUSR1 and Ctrl-C are passed on to the workers, which save and return; they have `grace_seconds` for it. `preload`:
    modules loaded once in the server that workers are forked from, so that a worker, and a restarted one, starts in a
    fraction of a second. Raises RuntimeError with the first failure's own words.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    multiprocessing.set_forkserver_preload(list(preload))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=max_restarts,
        monitor_interval=0.2,
        start_method="forkserver",
        # The agent would end the workers at once on these; ours lets them save first.
        signals_to_handle="SIGHUP",
        shutdown_timeout=10,
    )
    with _forwarding(grace_seconds):
        try:
            results = elastic_launch(config, work)(*arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            found: Any = failure.message
            message = str(found.get("message", found) if isinstance(found, dict) else found).strip() or "no message"
            raise RuntimeError(f"worker {rank} failed (exit code {failure.exitcode}): {message}") from None
    return results[0]


def let_the_cause_speak_first(error: RuntimeError) -> None:
    """A collective may have broken because another worker failed: give that one a moment, since the agent reports the
    first failure it sees.

    gloo raises a plain RuntimeError, NCCL a DistError; a subclass of our own, or of the library of a computation, is
    the cause itself.
    """
    if type(error) is RuntimeError or isinstance(error, DistError):
        time.sleep(2.0)


@contextmanager
def _forwarding(grace_seconds: float) -> Iterator[None]:
    """Pass requests to stop on to the workers while the block runs; workers that outlast the grace are killed."""

    def forward(number: int, frame: FrameType | None) -> None:
        print(f"passing {signal.Signals(number).name} on to the workers", file=sys.stderr, flush=True)
        for child in multiprocessing.active_children():
            if child.pid is not None and child.is_alive():
                os.kill(child.pid, number)
        signal.setitimer(signal.ITIMER_REAL, grace_seconds)

    def expire(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, expire)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
