"""The learning rate as a pure function of the step.

`learning_rate(step, ...)` is the rate that optimizer step number `step` applies, counted from 0. The conventions, so
that no step is wasted on a rate of zero and the last step of the run really uses the final rate:

- warmup of w steps: step s < w applies (s + 1) / w of the rate, so the first step moves and step w - 1 applies the full
  rate;
- a decay of d steps: its k-th step (k = 1 .. d) lies k / d of the way from the peak to the final rate, so exactly d
  steps are below the peak and the last one applies the final rate;
- from the end of the run on, the rate stays at the final one (a cosine that is not clamped rises again).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from argonne.config import OptimSection, ScheduleSection
from argonne.keys import decay_steps

if TYPE_CHECKING:
    import torch

DEFAULT_MIN_RATIO = 0.1
CURVE_POINTS = (0, 25, 50, 75, 100)


def learning_rate(step: int, total_steps: int, optim: OptimSection, schedule: ScheduleSection) -> float:
    """The rate that optimizer step `step` (from 0) of a run of `total_steps` applies.

    The schedule is one that `keys.check_schedule` has passed.
    """
    if step < 0:
        raise ValueError(f"step is {step}; steps count from 0")
    warmed = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
    if schedule.kind == "steps":
        changes = [(0, optim.lr), *((change.step, change.lr) for change in schedule.steps if change.step <= step)]
        return warmed * max(changes, key=lambda pair: pair[0])[1]
    length = decay_steps(total_steps, schedule)
    done = step - (total_steps - length) + 1
    if length == 0 or done <= 0:
        return warmed * optim.lr
    progress, final = min(1.0, done / length), final_rate(optim, schedule)
    share = (1 + math.cos(math.pi * progress)) / 2 if schedule.kind == "cosine" else 1 - progress
    return warmed * (final + (optim.lr - final) * share)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, peak: float) -> None:
    """Set AdamW's groups to `rate`; a group with another peak (Muon's) to the same share of its own."""
    for group in optimizer.param_groups:
        group["lr"] = rate if group["peak"] == peak else group["peak"] * (rate / peak)


def applied_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate in AdamW's groups, which is the schedule's."""
    return float(optimizer.param_groups[-1]["lr"])


def curve(total_steps: int, optim: OptimSection, schedule: ScheduleSection) -> list[tuple[int, float]]:
    """(step, rate) at 0, 25, 50, 75 and 100 % of the run; 100 % is its last step."""
    steps = [round((total_steps - 1) * percent / 100) for percent in CURVE_POINTS]
    return [(step, learning_rate(step, total_steps, optim, schedule)) for step in steps]


def final_rate(optim: OptimSection, schedule: ScheduleSection) -> float:
    """The rate a cosine or a wsd decay ends at: `min_lr`, or `min_ratio` (default 0.1) of the peak."""
    if schedule.min_lr is not None:
        return schedule.min_lr
    return optim.lr * (DEFAULT_MIN_RATIO if schedule.min_ratio is None else schedule.min_ratio)
