"""Requests to stop, durations and moments, and the limit on skipped steps."""

from __future__ import annotations

import os
import signal
import time

import pytest

from argonne.config import StopSection
from argonne.errors import InputError
from argonne.keys import parse_deadline, parse_duration
from argonne.train.guard import NonFinitePolicy, StopWatch


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("15m", 900),
        ("1.5h", 5400),
        ("2d", 172800),
        ("12:30:00", 45000),
        ("1-12:00:00", 129600),
        ("1-12:30", 131400),
    ],
)
def test_durations_are_read_as_schedulers_write_them(text: str, seconds: float) -> None:
    assert parse_duration(text, "stop.wall_time") == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5", "5 minutes", "1:2:3:4"])
def test_a_duration_that_is_none_is_refused_by_key(text: str) -> None:
    with pytest.raises(InputError, match=r"stop\.wall_time"):
        parse_duration(text, "stop.wall_time")


@pytest.mark.parametrize("key", ["stop.wall_time", "stop.grace", "log.telemetry_limit", "parallel.timeout"])
def test_two_numbers_that_may_be_hours_or_minutes_are_refused_with_both_ways_to_say_it(key: str) -> None:
    with pytest.raises(InputError, match=rf"{key}: found '12:30', .* 12:30:00 .* 00:12:30"):
        parse_duration("12:30", key)


def test_moments_are_iso_or_unix_seconds() -> None:
    assert parse_deadline("2026-11-21T00:00:00+00:00", "stop.deadline") == 1795219200
    assert parse_deadline("1795219200", "stop.deadline") == 1795219200
    with pytest.raises(InputError, match=r"stop\.deadline"):
        parse_deadline("tomorrow", "stop.deadline")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_becomes_a_request_with_its_name(number: signal.Signals) -> None:
    watch = StopWatch(StopSection())
    before = signal.getsignal(number)
    with watch.listening():
        assert watch.reason() is None
        os.kill(os.getpid(), number)
        assert watch.reason() == number.name
    assert signal.getsignal(number) is before


def test_the_wall_time_counts_from_the_start_of_the_command() -> None:
    assert StopWatch(StopSection(wall_time="1h"), started=time.monotonic() - 3601).reason() == "wall time"
    assert StopWatch(StopSection(wall_time="1h"), started=time.monotonic()).reason() is None


def test_a_deadline_in_the_past_stops_at_once() -> None:
    assert StopWatch(StopSection(deadline="2020-01-01T00:00:00+00:00")).reason() == "deadline"


def test_only_skips_in_a_row_count_towards_the_limit() -> None:
    policy = NonFinitePolicy(2)
    for skipped in (True, True, False, True, True):
        policy.observe(skipped)
    assert (policy.exceeded(), policy.total) == (False, 4)
    policy.observe(True)
    assert policy.exceeded()
