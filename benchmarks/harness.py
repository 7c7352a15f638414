"""Runs contestants in child processes, interleaved, and reports medians with their spread.

A benchmark module gives `contestants`: name -> function(point) -> numbers. Each measurement is a fresh process, so that
peak memory is its own; rounds go through the contestants forwards and backwards in turn, so that a slow spell of the
machine falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Contestants = Mapping[str, Callable[[str], dict[str, float]]]
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
RESULTS = Path(__file__).resolve().parent / "results"
LEAST_ROUNDS = 7
_ANSWER = "@@"


@dataclass(frozen=True)
class Column:
    """One figure of a table: its key in the numbers, its head, and how its median and spread are written."""

    key: str
    head: str
    form: str = ",.0f"


@dataclass(frozen=True)
class Benchmark:
    """A table: contestants by points, in `rounds` interleaved rounds. `relative_to`: the contestant whose first figure
    is 1.00x.

    `limit`: the contestant that does the least there is to do; each rate is given as a share of its rate too.
    `needs`: a file without which nothing is measured. `flags`: of the module's own, for the command in the table.
    `takes_part`: is a contestant measured at a point.
    """

    name: str
    module: str
    contestants: Contestants
    points: Mapping[str, str]
    columns: Sequence[Column]
    relative_to: str
    higher_is_better: bool = True
    limit: str | None = None
    needs: Path | None = None
    flags: str = ""
    takes_part: Callable[[str, str], bool] = lambda name, point: True


def reset_peak_memory() -> None:
    """Restart the kernel's high-water mark of this process (Linux). Raises OSError where the kernel has none."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """High-water mark of resident memory since the last reset, in MB of 1,048,576 bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def median_seconds(step: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and with --write put JSON into benchmarks/results and the table into docs/benchmarks.md. 1 if a
    contestant failed.
    """
    parser = argparse.ArgumentParser(description=f"Benchmark {benchmark.name}.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument(
        "--point", choices=list(benchmark.points), action="append", help="only this point (may be repeated)"
    )
    parser.add_argument("--only", nargs="+", choices=list(benchmark.contestants), help="only these contestants")
    parser.add_argument(
        "--rounds", type=int, default=LEAST_ROUNDS, help=f"rounds (default, and least for --write: {LEAST_ROUNDS})"
    )
    parser.add_argument(
        "--write", action="store_true", help="write JSON and the tables of docs/benchmarks.md; other points stay"
    )
    options = parser.parse_args(arguments)
    points = options.point or list(benchmark.points)
    if benchmark.needs is not None and not benchmark.needs.exists():
        print(f"{benchmark.name}: not measured, {benchmark.needs} is not there", file=sys.stderr)
        return 0
    if options.child:
        print(_ANSWER + json.dumps(benchmark.contestants[options.child](points[0])))
        return 0
    names = options.only or list(benchmark.contestants)
    if options.write and (options.rounds < LEAST_ROUNDS or options.only):
        parser.error(f"--write wants every contestant and at least {LEAST_ROUNDS} rounds")
    results, failures = measure(benchmark, names, points, options.rounds)
    facts = {"machine": machine(), "rounds": options.rounds}
    record = {
        "benchmark": benchmark.name,
        "command": f"python -m {benchmark.module}{benchmark.flags} --rounds {options.rounds} --write",
        "points": {point: {**facts, "results": results[point]} for point in points},
    }
    print(markdown(benchmark, record))
    if options.write and not failures:
        record = save(benchmark, record, RESULTS)
        write_table(DOCUMENT, benchmark.name, markdown(benchmark, record))
    return 1 if failures else 0


def save(benchmark: Benchmark, record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the record beside what the file holds of other points, each with the machine and commit it was measured on;
    the joined record.
    """
    path = folder / f"{benchmark.name}.json"
    earlier = json.loads(path.read_text())["points"] if path.exists() else {}
    known = {**earlier, **record["points"]}
    joined = {**record, "points": {point: known[point] for point in benchmark.points if point in known}}
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(joined, indent=1) + "\n")
    return joined


def measure(
    benchmark: Benchmark, names: Sequence[str], points: Sequence[str], rounds: int
) -> tuple[dict[str, dict[str, list[dict[str, float]]]], int]:
    """point -> contestant -> one dict of numbers a round; and how many measurements failed (each is told on stderr)."""
    results: dict[str, dict[str, list[dict[str, float]]]] = {
        point: {name: [] for name in names if benchmark.takes_part(name, point)} for point in points
    }
    failures = 0
    for number in range(rounds):
        for point in points:
            there = list(results[point])
            for name in there if number % 2 == 0 else reversed(there):
                found = _run_child(benchmark, name, point)
                if found is None:
                    failures += 1
                    continue
                results[point][name].append(found)
                first = benchmark.columns[0]
                print(
                    f"round {number + 1}/{rounds} {point} {name}: {found[first.key]:{first.form}} {first.head}",
                    file=sys.stderr,
                    flush=True,
                )
    return results, failures


def _run_child(benchmark: Benchmark, name: str, point: str) -> dict[str, float] | None:
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", benchmark.module, "--child", name, "--point", point]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet}, check=False)
    found = [line for line in run.stdout.splitlines() if line.startswith(_ANSWER)]
    if not found:
        reason = (run.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"{point} {name}: failed with exit code {run.returncode}: {reason}", file=sys.stderr)
        return None
    answer: dict[str, float] = json.loads(found[-1][len(_ANSWER) :])
    return answer


def markdown(benchmark: Benchmark, record: dict[str, Any]) -> str:
    """A table a point: median (smallest to largest) of each figure, and the ratio of the first to the reference
    contestant.
    """
    lines = [f"`{record['command']}`"]
    for point, measured in record["points"].items():
        computer, rows = measured["machine"], measured["results"]
        lines += ["", f"**{benchmark.points[point]}**", ""]
        lines.append(
            f"{measured['rounds']} rounds, {computer['date']}, commit {computer['commit']}. {describe(computer)}"
        )
        head = (
            [column.head for column in benchmark.columns] + ["ratio"] + ["of the limit"] * (benchmark.limit is not None)
        )
        lines += ["", "| | " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(head)]
        lines += [_row(benchmark, name, rows) for name in rows]
    return "\n".join(lines)


def _row(benchmark: Benchmark, name: str, rows: Mapping[str, Sequence[dict[str, float]]]) -> str:
    rounds, key = rows[name], benchmark.columns[0].key
    if not rounds:
        return f"| {name} | failed |" + " |" * (len(benchmark.columns) + (benchmark.limit is not None))
    cells = [_cell(rounds, column) for column in benchmark.columns]
    own, reference = _median(rounds, key), _median(rows.get(benchmark.relative_to, []), key)
    cells.append(
        f"{(own / reference if benchmark.higher_is_better else reference / own):.2f}x" if own and reference else "n/a"
    )
    if benchmark.limit is not None:
        limit = _median(rows.get(benchmark.limit, []), key)
        cells.append(f"{100 * own / limit:.0f} %" if own and limit else "n/a")
    return f"| {name} | " + " | ".join(cells) + " |"


def _median(rounds: Sequence[dict[str, float]], key: str) -> float | None:
    return statistics.median(found[key] for found in rounds) if rounds else None


def _cell(rounds: Sequence[dict[str, float]], column: Column) -> str:
    if column.key not in rounds[0]:
        return "n/a"
    values = [found[column.key] for found in rounds]
    return f"{statistics.median(values):{column.form}} ({min(values):{column.form}} to {max(values):{column.form}})"


def machine() -> dict[str, str]:
    """What was measured on."""
    import importlib.metadata

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (model := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        cpu = model[1]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    cores = str(len(os.sched_getaffinity(0)))
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return {
        "cpu": cpu,
        "cores": cores,
        "python": platform.python_version(),
        **versions,
        "date": date,
        "commit": commit.stdout.strip() or "none",
    }


def describe(computer: dict[str, str]) -> str:
    device = f"{computer['gpu']}, " if "gpu" in computer else ""
    return (
        f"{device}{computer['cpu']}, {computer['cores']} cores, Python {computer['python']}, torch "
        f"{computer['torch']}, "
        f"transformers {computer['transformers']}."
    )


def write_table(document: Path, name: str, table: str) -> None:
    """Replace what stands between the markers `<!-- NAME begin -->` and `<!-- NAME end -->`. Raises ValueError where
    they are not.
    """
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    text = document.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{document}: no markers {begin} and {end}; put them where the table belongs")
    before, rest = text.split(begin, 1)
    document.write_text(before + begin + "\n" + table + "\n" + end + rest.split(end, 1)[1])
