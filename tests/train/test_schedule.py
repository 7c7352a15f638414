"""The learning-rate curve: bounded, smooth, and right at each boundary."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.config import OptimSection, RateChange, ScheduleSection
from argonne.errors import InputError
from argonne.keys import check_rates, check_schedule, decay_steps
from argonne.train.schedule import curve, final_rate, learning_rate

PEAK = OptimSection(lr=3e-4)


def check(total: int, schedule: ScheduleSection) -> None:
    check_rates(PEAK, schedule)
    check_schedule(total, schedule)


def rates(total: int, schedule: ScheduleSection, optim: OptimSection = PEAK) -> list[float]:
    return [learning_rate(step, total, optim, schedule) for step in range(total)]


@st.composite
def fitting_schedules(draw: st.DrawFn) -> tuple[int, ScheduleSection]:
    total = draw(st.integers(2, 400))
    warmup = draw(st.integers(0, total // 2))
    kind = draw(st.sampled_from(["cosine", "wsd", "constant"]))
    decay = float(draw(st.integers(0, total - warmup))) if kind == "wsd" else None
    return total, ScheduleSection(
        kind=kind, warmup=warmup, decay=decay, min_ratio=draw(st.sampled_from([None, 0.0, 0.1, 1.0]))
    )


@given(fitting_schedules())
def test_every_rate_lies_above_zero_or_the_floor_and_at_most_at_the_peak(case: tuple[int, ScheduleSection]) -> None:
    total, schedule = case
    values = rates(total, schedule)
    assert max(values) <= PEAK.lr * (1 + 1e-12)
    assert min(values[schedule.warmup :], default=PEAK.lr) >= final_rate(PEAK, schedule) * (1 - 1e-12)
    assert values[0] > 0 or (schedule.warmup == 0 and final_rate(PEAK, schedule) == 0)


@given(fitting_schedules())
def test_the_curve_has_no_jump(case: tuple[int, ScheduleSection]) -> None:
    total, schedule = case
    values = rates(total, schedule)
    slopes = [1 / schedule.warmup if schedule.warmup else 0.0]
    length = decay_steps(total, schedule)
    slopes.append((math.pi / 2 if schedule.kind == "cosine" else 1.0) / length if length else 0.0)
    steepest = max(slopes) * PEAK.lr
    assert all(abs(after - before) <= steepest * (1 + 1e-9) for before, after in itertools.pairwise(values))


@given(fitting_schedules())
def test_it_rises_through_the_warmup_and_never_after_it(case: tuple[int, ScheduleSection]) -> None:
    total, schedule = case
    values = rates(total, schedule)
    warm, rest = values[: schedule.warmup], values[schedule.warmup :]
    assert warm == sorted(warm)
    assert rest == sorted(rest, reverse=True)


@given(fitting_schedules())
def test_steps_past_the_end_keep_the_last_rate(case: tuple[int, ScheduleSection]) -> None:
    total, schedule = case
    last = learning_rate(total - 1, total, PEAK, schedule)
    assert {learning_rate(total + extra, total, PEAK, schedule) for extra in (0, 1, total)} == {last}


def test_warmup_starts_above_zero_and_its_last_step_applies_the_full_rate() -> None:
    values = rates(100, ScheduleSection(kind="constant", warmup=10))
    assert values[0] == pytest.approx(PEAK.lr / 10)
    assert values[8] < values[9] == values[99] == PEAK.lr


def test_cosine_ends_at_the_floor_and_passes_halfway_at_the_middle() -> None:
    values = rates(110, ScheduleSection(kind="cosine", warmup=10, min_lr=1e-5))
    assert values[9] == PEAK.lr
    assert values[59] == pytest.approx((PEAK.lr + 1e-5) / 2)
    assert values[109] == pytest.approx(1e-5)


def test_wsd_lowers_exactly_the_decay_steps() -> None:
    values = rates(100, ScheduleSection(kind="wsd", warmup=5, decay=20.0))
    assert values[79] == PEAK.lr
    assert values[80] < PEAK.lr
    assert values[99] == pytest.approx(PEAK.lr * 0.1)


def test_a_share_of_the_run_is_the_same_decay_as_its_steps() -> None:
    assert rates(200, ScheduleSection(kind="wsd", decay=0.15)) == rates(200, ScheduleSection(kind="wsd", decay=30.0))


def test_no_decay_on_purpose_keeps_the_peak_to_the_end() -> None:
    assert set(rates(50, ScheduleSection(kind="wsd", decay=0.0))) == {PEAK.lr}


def test_a_table_changes_the_rate_at_its_step() -> None:
    optim = OptimSection(lr=3e-5)
    schedule = ScheduleSection(kind="steps", steps=(RateChange(62_000, 5e-5),))
    assert learning_rate(0, 160_000, optim, schedule) == 3e-5
    assert learning_rate(61_999, 160_000, optim, schedule) == 3e-5
    assert learning_rate(62_000, 160_000, optim, schedule) == 5e-5
    assert learning_rate(159_999, 160_000, optim, schedule) == 5e-5


def test_the_printed_curve_covers_the_first_and_the_last_step() -> None:
    points = curve(1000, PEAK, ScheduleSection(kind="wsd", warmup=100, decay=0.2))
    assert [step for step, _ in points] == [0, 250, 500, 749, 999]
    assert [rate for _, rate in points] == pytest.approx([3e-6, 3e-4, 3e-4, 3e-4, 3e-5])


@pytest.mark.parametrize(
    ("total", "schedule", "message"),
    [
        (10, ScheduleSection(kind="wsd"), "decay: not set"),
        (10, ScheduleSection(kind="wsd", warmup=6, decay=5.0), "do not fit into the run's 10"),
        (10, ScheduleSection(kind="wsd", decay=2.5), "whole number"),
        (10, ScheduleSection(kind="wsd", decay=0.01), "less than one step"),
        (10, ScheduleSection(kind="cosine", warmup=11), "more than the run's 10"),
        (0, ScheduleSection(kind="constant"), "at least 1"),
        (10, ScheduleSection(kind="cosine", min_lr=1e-5, min_ratio=0.1), "both set"),
        (10, ScheduleSection(kind="cosine", min_lr=1.0), "to optim.lr"),
        (10, ScheduleSection(kind="steps"), "empty"),
        (10, ScheduleSection(kind="steps", steps=(RateChange(5, 1e-4), RateChange(5, 2e-4))), "rising"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(total: int, schedule: ScheduleSection, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(total, schedule)
