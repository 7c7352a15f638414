"""Local workers: forked from a server that has everything loaded, watched, started again together, told of requests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

from torch.distributed import DistError, TCPStore

from argonne.errors import REQUESTS, Ended, Stopped, first_line, outlive_stderr
from argonne.parallel.nodes import POLL_SECONDS, Nodes, Place, World

HOST = "127.0.0.1"
EXIT_SECONDS = 30.0
LONGEST = 60  # of a temporary folder's name: that of a socket in it has at most 107 bytes


class WorkerFailed(RuntimeError):
    """A worker raised, died or was killed, and no restart is left."""


@dataclass
class _Worker:
    rank: int
    process: Any  # of a multiprocessing context
    connection: Connection


def run_workers(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    count: int,
    max_restarts: int,
    grace_seconds: float,
    preload: Sequence[str] = (),
    place: Place | None = None,
    join_seconds: float = 0.0,
) -> list[Any]:
    """Run `work(*arguments)` on `count` local processes that can reach one another; returns the results by rank.

    A worker that fails, dies or is killed ends the others, and all start again up to `max_restarts` times, unless one
    returned an Ended before: then those are the results. Requests to stop (`REQUESTS`) are passed on to the workers,
    which save and return; they have `grace_seconds` for it, and a worker that returns a Stopped passes it on to the
    others as well. After a request nothing is started again.
    `preload`: modules loaded once in the server that workers are forked from. `place`: this is one of several nodes,
    which wait `join_seconds` for one another, fail, start again and stop together; results are this node's.

    Raises WorkerFailed with the first failure's own words; Stopped where it followed a request.
    """
    _start_server(preload)
    with _forwarding(grace_seconds) as requests, _among(place, requests, join_seconds) as nodes:
        for attempt in range(max_restarts + 1):
            workers: list[_Worker] = []
            world = _alone(count) if nodes is None else nodes.meet(attempt, count)
            try:
                for local_rank in range(count):
                    workers.append(_start(work, arguments, local_rank, count, world, attempt))
                    requests.add(workers[-1])
                results, failure = _watch(workers, requests, nodes)
            finally:
                for worker in workers:
                    worker.process.kill()
                    worker.process.join()
                    worker.connection.close()
                requests.workers.clear()
            if nodes is not None:
                failure = nodes.agree()
            if failure is None:
                return results
            if requests.number is not None:
                reason = f"the workers did not end within {grace_seconds:g} s" if requests.late else failure
                raise Stopped(f"asked to stop ({requests.number.name}), but {reason}")
            if attempt < max_restarts:
                left = max_restarts - attempt - 1
                print(f"{failure}; all start again from the last checkpoint, {left} restarts left", file=sys.stderr)
    raise WorkerFailed(failure)


def _alone(count: int) -> World:
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    return World(HOST, store.port, 0, count, store)


@contextmanager
def _among(place: Place | None, requests: _Requests, join_seconds: float) -> Iterator[Nodes | None]:
    nodes = None if place is None else Nodes(place, requests, join_seconds)
    try:
        yield nodes
    finally:
        if nodes is not None:
            nodes.leave()


def let_the_cause_speak_first(error: RuntimeError) -> None:
    """A collective may have broken because another worker failed: give that one a moment, since the first failure that
    is seen is the one that is told.

    gloo raises a plain RuntimeError, NCCL a DistError; a subclass of our own, or of the library of a computation, is
    the cause itself.
    """
    if type(error) is RuntimeError or isinstance(error, DistError):
        time.sleep(2.0)


def _start_server(preload: Sequence[str]) -> None:
    """The process that workers are forked from. Requests are blocked in it and in what it forks: one that is sent to
    the whole process group ends neither it nor a worker that is still starting, where it waits until `listening`.
    """
    multiprocessing.set_forkserver_preload(list(preload))
    before, folder = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS), tempfile.tempdir
    try:
        if len(tempfile.gettempdir()) > LONGEST:
            tempfile.tempdir = "/tmp"
        resource_tracker.ensure_running()  # leaves two of them unblocked here
        signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
        forkserver.ensure_running()
    finally:
        tempfile.tempdir = folder
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(
    work: Callable[..., Any], arguments: tuple[Any, ...], local_rank: int, count: int, world: World, attempt: int
) -> _Worker:
    mine, its = multiprocessing.Pipe()
    rank = world.first + local_rank
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": world.address,
        "MASTER_PORT": str(world.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the launcher's
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }
    process = multiprocessing.get_context("forkserver").Process(
        target=_serve, args=(work, arguments, environment, its), name=f"worker-{rank}"
    )
    process.start()
    its.close()
    return _Worker(rank, process, mine)


def _serve(work: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], its: Connection) -> None:
    """A worker's life: the answer is (result, None) or (None, what was raised)."""
    outlive_stderr()
    os.environ.update(environment)
    answered = threading.Event()

    def end_with_launcher() -> None:
        its.poll(None)  # nothing is ever sent this way: it ends where the launcher does, however it does
        if not answered.is_set():
            os._exit(1)

    threading.Thread(target=end_with_launcher, daemon=True).start()
    try:
        answer: tuple[Any, str | None] = (work(*arguments), None)
    except Exception as error:
        traceback.print_exc()
        answer = (None, f"{type(error).__name__}: {first_line(error)}")
    answered.set()
    its.send(answer)
    sys.exit(0 if answer[1] is None else 1)


def _watch(workers: list[_Worker], requests: _Requests, nodes: Nodes | None = None) -> tuple[list[Any], str | None]:
    """Wait for all; (their results, None), or the first failure as soon as it is seen, here or on another node."""
    results: dict[int, Any] = {}
    while len(results) < len(workers):
        left = {worker.connection: worker for worker in workers if worker.rank not in results}
        for ready in wait(list(left), None if nodes is None else POLL_SECONDS):
            worker = left[ready]  # type: ignore[index] # these are Connections
            try:
                results[worker.rank], problem = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                problem = "it ended without a word"
            if problem is not None:
                final = [found for found in results.values() if isinstance(found, Ended)]
                if nodes is None and final and requests.number is None:
                    return final, None  # of the others this was the consequence, on every try
                if nodes is not None:  # before the others find that it is gone
                    nodes.tell(f"worker {worker.rank} failed: {problem}")
                worker.process.join(EXIT_SECONDS)
                return [], f"worker {worker.rank} failed (exit code {worker.process.exitcode}): {problem}"
            if isinstance(results[worker.rank], Stopped):
                requests.ask(signal.SIGTERM)
        if nodes is not None and (told := nodes.listen()) is not None:
            return [], told
    for worker in workers:
        worker.process.join(EXIT_SECONDS)  # what a library still does at its exit is not waited for any longer
    return [results[rank] for rank in sorted(results)], None


class _Requests:
    """What the launcher was asked, for the workers that run and for those that start later."""

    def __init__(self, grace_seconds: float) -> None:
        self.number: signal.Signals | None = None
        self.late = False
        self.workers: list[_Worker] = []
        self._grace_seconds = grace_seconds

    def add(self, worker: _Worker) -> None:
        self.workers.append(worker)
        if self.number is not None:
            _send(worker, self.number)

    def ask(self, number: signal.Signals) -> None:
        if self.number is None:
            self.number = number
            signal.setitimer(signal.ITIMER_REAL, self._grace_seconds)
        for worker in self.workers:
            _send(worker, number)


def _send(worker: _Worker, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(worker.process.pid, number)


@contextmanager
def _forwarding(grace_seconds: float) -> Iterator[_Requests]:
    """Pass requests to stop on to the workers while the block runs; workers that outlast the grace are killed."""
    requests = _Requests(grace_seconds)

    def forward(number: int, frame: FrameType | None) -> None:
        requests.ask(signal.Signals(number))

    def expire(number: int, frame: FrameType | None) -> None:
        requests.late = True
        for worker in requests.workers:
            worker.process.kill()

    heard = [number for number in REQUESTS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in heard}
    previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, expire)
    try:
        yield requests
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
