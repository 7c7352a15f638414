"""What may end a run early, and in which order: requests to stop, the wall clock, non-finite gradients."""

from __future__ import annotations

import faulthandler
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from argonne.config import StopSection
from argonne.errors import REQUESTS, Stopped
from argonne.keys import parse_deadline, parse_duration


class StopWatch:
    """Knows whether this process was asked to stop, and why. The wall time counts from the start of the command, set-up
    included.

    Durations use the monotonic clock, so that a clock set back changes nothing; only a deadline, a moment in the world,
    reads the wall clock.
    """

    def __init__(self, stop: StopSection, *, started: float | None = None) -> None:
        self._reason: str | None = None
        self._raises = False
        begin = time.monotonic() if started is None else started
        self._wall_end = begin + parse_duration(stop.wall_time, "stop.wall_time") if stop.wall_time else None
        self._deadline = parse_deadline(stop.deadline, "stop.deadline") if stop.deadline else None

    def request(self, reason: str) -> None:
        if self._reason is None:
            self._reason = reason

    def reason(self) -> str | None:
        """Why to stop now, None to go on."""
        if self._reason is None:
            if self._wall_end is not None and time.monotonic() >= self._wall_end:
                self._reason = "wall time"
            elif self._deadline is not None and time.time() >= self._deadline:
                self._reason = "deadline"
        return self._reason

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """While the block runs a request ends it at once, by Stopped: what it does can be done again."""
        self._raises = True
        try:
            if self._reason is not None:
                raise Stopped(f"asked to stop ({self._reason}) before the first step")
            yield
        finally:
            self._raises = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn `REQUESTS` into requests while the block runs; further ones change nothing."""

        def handle(number: int, frame: FrameType | None) -> None:
            self.request(signal.Signals(number).name)
            if self._raises:
                self._raises = False
                raise Stopped(f"asked to stop ({self._reason}) before the first step")

        previous: dict[signal.Signals, Any] = {}
        with suppress(ValueError):  # not the main thread: whoever owns it forwards requests
            for asked in REQUESTS:
                if signal.getsignal(asked) is not signal.SIG_IGN:  # as nohup starts it: stays ignored
                    previous[asked] = signal.signal(asked, handle)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, previous)  # of a worker: what came while it started comes now
        try:
            yield
        finally:
            for asked, handler in previous.items():
                signal.signal(asked, handler)


class NonFinitePolicy:
    """Counts skipped steps; more than `limit` in a row is the end of the run, with the last good checkpoint named."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_a_row, self.total = limit, 0, 0

    def observe(self, skipped: bool) -> None:
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped

    def exceeded(self) -> bool:
        return self.in_a_row > self.limit


class SpikeWatch:
    """Tells a loss that lies far above the recent ones: over the median by ten typical deviations and by a tenth of
    itself.

    The typical deviation is the median absolute deviation times 1.4826, which a spike itself does not move.
    """

    def __init__(self, window: int = 100, least: int = 30) -> None:
        self._recent: deque[float] = deque(maxlen=window)
        self._least = least

    def observe(self, loss: float) -> float | None:
        """Take in the next loss; the usual one where this is a spike, None otherwise."""
        usual = None
        if len(self._recent) >= self._least and math.isfinite(loss):
            middle = statistics.median(self._recent)
            deviation = 1.4826 * statistics.median(abs(value - middle) for value in self._recent)
            usual = middle if loss > middle + 10 * deviation and loss > 1.1 * middle else None
        if math.isfinite(loss):
            self._recent.append(loss)
        return usual


class HangWatch:
    """Ends a worker that makes no step for `seconds`, after writing every thread's stack to `path`. None: watches
    nothing.

    It runs in C, so a process stuck inside a collective is caught as well; the launcher then ends and restarts the
    others.
    """

    def __init__(self, path: Path, seconds: float | None) -> None:
        self._path, self._seconds = path, seconds
        self._file: TextIO | None = None
        self._first = True

    def alive(self) -> None:
        """Call once a step. The first step may compile and gets three times as long."""
        if self._seconds is None:
            return
        if self._file is None:
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - faulthandler needs it open
        faulthandler.dump_traceback_later(self._seconds * (3 if self._first else 1), exit=True, file=self._file)
        self._first = False

    def pause(self) -> None:
        """Watch nothing until the next `alive`: a save or an evaluation has limits of its own."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if self._path.stat().st_size == 0:
                self._path.unlink()
