"""Local workers: forked from a server that has everything loaded, watched, started again together, told of requests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
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

from argonne.errors import REQUESTS, Stopped, first_line, outlive_stderr

HOST = "127.0.0.1"
EXIT_SECONDS = 30.0


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
) -> list[Any]:
    """Run `work(*arguments)` on `count` local processes that can reach one another; returns the results by rank.

    A worker that fails, dies or is killed ends the others, and all start again up to `max_restarts` times. Requests to
    stop (`REQUESTS`) are passed on to the workers, which save and return; they have `grace_seconds` for it, and a
    worker that returns a Stopped passes it on to the others as well. After a request nothing is started again.
    `preload`: modules loaded once in the server that workers are forked from.

    Raises WorkerFailed with the first failure's own words; Stopped where it followed a request.
    """
    _start_server(preload)
    with _forwarding(grace_seconds) as requests:
        for attempt in range(max_restarts + 1):
            workers: list[_Worker] = []
            store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
            try:
                for rank in range(count):
                    workers.append(_start(work, arguments, rank, count, store.port, attempt))
                    requests.add(workers[-1])
                results, failure = _watch(workers, requests)
            finally:
                for worker in workers:
                    worker.process.kill()
                    worker.process.join()
                    worker.connection.close()
                requests.workers.clear()
            if failure is None:
                return results
            if requests.number is not None:
                reason = f"the workers did not end within {grace_seconds:g} s" if requests.late else failure
                raise Stopped(f"asked to stop ({requests.number.name}), but {reason}")
            if attempt < max_restarts:
                left = max_restarts - attempt - 1
                print(f"{failure}; all start again from the last checkpoint, {left} restarts left", file=sys.stderr)
    raise WorkerFailed(failure)


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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        resource_tracker.ensure_running()  # leaves two of them unblocked here
        signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(
    work: Callable[..., Any], arguments: tuple[Any, ...], rank: int, count: int, port: int, attempt: int
) -> _Worker:
    mine, its = multiprocessing.Pipe()
    environment = {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
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


def _watch(workers: list[_Worker], requests: _Requests) -> tuple[list[Any], str | None]:
    """Wait for all; (their results, None), or the first failure as soon as it is seen."""
    results: dict[int, Any] = {}
    while len(results) < len(workers):
        left = {worker.connection: worker for worker in workers if worker.rank not in results}
        for ready in wait(list(left)):
            worker = left[ready]  # type: ignore[index] # these are Connections
            try:
                results[worker.rank], problem = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                problem = "it ended without a word"
            if problem is not None:
                worker.process.join(EXIT_SECONDS)
                return [], f"worker {worker.rank} failed (exit code {worker.process.exitcode}): {problem}"
            if isinstance(results[worker.rank], Stopped):
                requests.ask(signal.SIGTERM)
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
