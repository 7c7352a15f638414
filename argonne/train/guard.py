"""What may end a run early, and in which order: requests to stop, the wall clock, non-finite gradients."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

from argonne.config import StopSection
from argonne.errors import InputError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str, where: str) -> float:
    """Seconds of `90`, `15m`, `1.5h`, `2d`, `12:30:00` or SLURM's `1-12:00:00`. Raises InputError naming the key."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip()):
        return float(match[1]) * _UNITS[match[2] or "s"]
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d{1,2})(?::(\d{1,2}))?", text.strip()):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return days * 86400.0 + hours * 3600.0 + minutes * 60.0 + seconds
    raise InputError(f"{where}: found {text!r}, expected seconds, or 90m, 12h, 2d, 12:30:00 or 1-12:00:00")


def parse_moment(text: str, where: str) -> float:
    """Unix seconds of an ISO 8601 moment (local time where no zone is given) or of a number of Unix seconds."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise InputError(f"{where}: found {text!r}, expected ISO 8601 such as 2026-11-21T18:00:00+00:00, or Unix seconds") from None


class StopWatch:
    """Knows whether this process was asked to stop, and why. The wall time counts from the start of the command, set-up included.

    Durations use the monotonic clock, so that a clock set back changes nothing; only a deadline, a moment in the world, reads the wall clock.
    """

    def __init__(self, stop: StopSection, *, started: float | None = None) -> None:
        self._reason: str | None = None
        begin = time.monotonic() if started is None else started
        self._wall_end = begin + parse_duration(stop.wall_time, "stop.wall_time") if stop.wall_time else None
        self._deadline = parse_moment(stop.deadline, "stop.deadline") if stop.deadline else None

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

    def seconds_left(self) -> float:
        """Seconds until the wall time or the deadline; infinite without either."""
        ends = [float("inf")]
        if self._wall_end is not None:
            ends.append(self._wall_end - time.monotonic())
        if self._deadline is not None:
            ends.append(self._deadline - time.time())
        return min(ends)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn SIGTERM, SIGUSR1 and Ctrl-C into requests while the block runs; a second Ctrl-C interrupts at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self._reason is not None:
                raise KeyboardInterrupt
            self.request(signal.Signals(number).name)

        previous: dict[int, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                previous[number] = signal.signal(number, handle)
        except ValueError:  # not the main thread: whoever owns it forwards requests
            pass
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class NonFinitePolicy:
    """Counts skipped steps; more than `limit` in a row is the end of the run, with the last good checkpoint named."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_a_row, self.total = limit, 0, 0

    def observe(self, skipped: bool) -> None:
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped

    def exceeded(self) -> bool:
        return self.in_a_row > self.limit


class Diverged(RuntimeError):
    """Too many steps in a row had a non-finite gradient."""
