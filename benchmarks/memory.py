"""Memory of a benchmark's process with all its children, as it would be missing to others: proportional set size,
sampled.
"""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

INTERVAL_SECONDS = 0.25


class TreeMemory:
    """`with TreeMemory() as memory: work()`; then `memory.peak_mb` is the most that this process and its descendants
    held together.
    """

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="benchmark-memory", daemon=True)

    def __enter__(self) -> TreeMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        own = psutil.Process()
        while not self._stop.wait(INTERVAL_SECONDS):
            self.peak_mb = max(self.peak_mb, sum(map(_proportional_mb, [own, *own.children(recursive=True)])))


def _proportional_mb(process: psutil.Process) -> float:
    """A page that n processes share counts 1/n for each; a process that has just ended holds none."""
    try:
        return float(process.memory_full_info().pss) / 2**20
    except psutil.Error:
        return 0.0
