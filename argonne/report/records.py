"""Reading `metrics.jsonl`, the append-only record of a run.

A session begins with a record `start` or `resume`. A run that was killed goes on from its last checkpoint: what it had
written beyond that step is void, though it took its time. The last record of an (event, step) is the one that counts;
warnings of one step are told apart by their message, tasks by their name. A line that was cut by a kill is left out and
named in `problems`; nothing else is ever skipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.errors import InputError

Record = dict[str, Any]
BEGINS = ("start", "resume")
APART = {"warning": "message", "task": "task"}  # event -> what tells several of one step apart


@dataclass(frozen=True)
class Metrics:
    """The records of one run that count, in step order. hours: of all its sessions, each from its beginning to its last
    record; None where no record has a time. worked: the hours when the first record of a step was written, by step.
    """

    path: Path
    records: tuple[Record, ...]
    lines: int
    hours: float | None
    worked: Mapping[int, float]
    problems: tuple[str, ...]

    def of(self, event: str) -> list[Record]:
        """Records of one event, by step."""
        return [record for record in self.records if record["event"] == event]

    def last(self, event: str) -> Record | None:
        found = self.of(event)
        return found[-1] if found else None

    def series(self, event: str, *names: str) -> tuple[list[int], list[float]]:
        """Steps and values of `record[name][name]...`; a record without a number there (null, absent)
        gives no point.
        """
        steps, values = [], []
        for record in self.of(event):
            value: Any = record
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            if isinstance(value, int | float) and not isinstance(value, bool):
                steps.append(int(record["step"]))
                values.append(float(value))
        return steps, values

    def sources(self) -> list[str]:
        """Names of the training sources, in order of appearance."""
        return list(dict.fromkeys(name for record in self.of("step") for name in record.get("sources") or {}))


def read_metrics(path: Path) -> Metrics:
    """Read a run folder's `metrics.jsonl` (or the file itself). Raises InputError where there is none, or a line is not
    such a record.
    """
    file = layout.metrics_of(path)
    problems: list[str] = []
    kept: dict[tuple[str, int, str], Record] = {}
    worked: dict[int, float] = {}
    lines, seconds, earlier = 0, 0.0, None
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            problems.append(f"{file.name}, line {number}: cut in the middle ({len(line)} bytes), left out")
            continue
        lines += 1
        event, step = (record.get("event"), record.get("step")) if isinstance(record, dict) else (None, None)
        if not isinstance(event, str) or not isinstance(step, int):
            found = f"keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
            raise InputError(
                f"{file}, line {number}: found {found}, expected an object with event and step: another program's file"
            )
        if isinstance(moment := record.get("time"), int | float):
            seconds += moment - earlier if earlier is not None and event not in BEGINS else 0.0
            earlier = moment
        if event in BEGINS:
            kept = {key: held for key, held in kept.items() if held["step"] <= step}
            worked = {at: hours for at, hours in worked.items() if at <= step}
        if earlier is not None:
            worked.setdefault(step, seconds / 3600)
        key = (event, step, str(record.get(APART[event], "")) if event in APART else "")
        kept.pop(key, None)
        kept[key] = record
    ordered = sorted(kept.values(), key=lambda record: record["step"])
    hours = None if earlier is None else seconds / 3600
    return Metrics(file, tuple(ordered), lines, hours, dict(sorted(worked.items())), tuple(problems))


def smoothed(values: list[float], share: float = 0.02) -> list[float]:
    """Exponential moving average over about `share` of the values, with bias correction (as in Adam, Kingma and Ba
    2015).

    As many values as came in; non-finite ones are passed over.
    """
    weight = 1 - 1 / max(1.0, share * len(values))
    total, norm, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total = weight * total + (1 - weight) * value
            norm = weight * norm + (1 - weight)
        result.append(total / norm if norm else math.nan)
    return result
