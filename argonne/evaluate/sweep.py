"""`argonne merge --sweep`: a grid of averages of two models, each measured on one task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from argonne.errors import InputError
from argonne.evaluate.run import evaluate
from argonne.evaluate.tasks import make_tasks
from argonne.publish.merge import Mixer

BAR = 30


def sweep(
    mixer: Mixer,
    task: str,
    steps: int,
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The task's number at each of `steps` + 1 weights of the first of two models, from 0 to 1. {"task", "measure",
    "better": "lower" or "higher", "grid": [{"weight", "value"}], "best": weight}.
    """
    name, better = headline_of(task)
    grid = []
    for number in range(steps + 1):
        weight = number / steps
        found = evaluate(mixer.names[0], [task], data, limit=limit, loaded=mixer.mix([weight, 1 - weight]))
        grid.append({"weight": weight, "value": found["tasks"][task][name]})
        if progress is not None:
            progress(number + 1, steps + 1)
    choose = min if better == "lower" else max
    best = choose(grid, key=lambda point: point["value"])
    return {"task": task, "measure": name, "better": better, "grid": grid, "best": best["weight"]}


def headline_of(task: str) -> tuple[str, str]:
    """The number by which a task compares models, and which is better. Raises InputError where there is none."""
    (made,) = make_tasks([task])
    if made.headline is None:
        raise InputError(f"--sweep {task}: tells no single number to compare; use another task, such as bpb")
    return made.headline


def sweep_lines(found: dict[str, Any], names: tuple[str, str]) -> list[str]:
    """A line a weight, with a bar of its value."""
    values = [point["value"] for point in found["grid"]]
    low, spread = min(values), (max(values) - min(values)) or 1.0
    lines = [
        f"weight of {names[0]}, the rest of {names[1]}: {found['measure']} of {found['task']} ({found['better']} is "
        "better)"
    ]
    for point in found["grid"]:
        bar = "#" * round(1 + (BAR - 1) * (point["value"] - low) / spread)
        mark = "  best" if point["weight"] == found["best"] else ""
        lines.append(f"  {point['weight']:.2f}  {point['value']:.4f}  {bar}{mark}")
    return lines
