"""Several processes that share the questions. They never talk: each writes its answers into the folder, and batches are
the same as those of one process, so that answers are too.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from argonne.errors import REQUESTS, InputError, Stopped
from argonne.evaluate.kept import Kept

GRACE_SECONDS = 10.0
WATCH_SECONDS = 2.0


def share_out(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    count: int,
    kept: Sequence[Kept[Any]],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run `work(*arguments)` in `count` processes, which write what is kept, and read it. Raises what a process raised
    for its input, WorkerFailed where one broke, Stopped where they were asked to stop.
    """
    from argonne.parallel.launch import run_workers

    ended = threading.Event()

    def watch() -> None:
        while progress is not None and not ended.wait(WATCH_SECONDS):
            done, total = (sum(part) for part in zip(*(one.written() for one in kept), strict=True))
            progress(min(done, total), total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    how: dict[str, Any] = {"count": count, "max_restarts": 0, "grace_seconds": GRACE_SECONDS}
    try:
        faults = run_workers(_guarded, (work, arguments), preload=(work.__module__,), **how)
    except Stopped:
        raise Stopped("asked to stop; with --out the same command goes on from the answers in it") from None
    finally:
        ended.set()
        watcher.join()
    for fault in faults:
        if fault is not None:
            raise fault
    for one in kept:
        one.read()


def _guarded(work: Callable[..., None], arguments: tuple[Any, ...]) -> InputError | None:
    """A request ends a process at once: what it answered lies on the disk."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)
    try:
        work(*arguments)
    except InputError as error:
        return error
    return None
