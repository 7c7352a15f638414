"""Who encodes the units: this process, a pool of processes, SLURM, Ray. Each yields (unit, record) as units finish."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from argonne.data.encode import Job
from argonne.errors import InputError

Results = Iterator[tuple[int, dict[str, Any]]]


def run(engine: str, job: Job, units: list[int], workers: int) -> Results:
    """Encode `units` with `workers` processes (0 = one a core). Raises what a worker raised."""
    if engine != "local":
        raise InputError(f"--engine: found {engine!r}, expected local, slurm or ray")
    count = max(1, min(workers or os.cpu_count() or 1, len(units)))
    return _pool(job, units, count) if count > 1 else ((number, job.run(number)) for number in units)


def _begin_worker(parent: int) -> None:
    """One thread for each worker, and none outlives a main process that was killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _pool(job: Job, units: list[int], workers: int) -> Results:
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),)
    ) as pool:
        waiting = {pool.submit(job.run, number): number for number in units}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
