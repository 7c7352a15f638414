"""`make size`: how large the code is and how much of it a reader must open, beside the limits that CONTRIBUTING.md
states.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import structure
from tools.traced_run import LOCATES, READING, Ran, Trace, trace_run

ROOT = Path(__file__).resolve().parent.parent
# Their parts of a step are counted by themselves: what reads a batch, and what ships with a checkpoint.
APART = (*READING, "model")
LONGEST_FUNCTION = "lines of the longest function"


@dataclass(frozen=True)
class Measure:
    """One figure, and what a reader wants to see of it: the few things to name beside it, and the whole list under
    `--verbose`.
    """

    name: str
    found: int
    named: str = ""
    listed: tuple[str, ...] = ()


def read_limits(text: str) -> dict[str, int]:
    """The rows `| measure | limit |` of the table whose head is `| Measure | Limit |`. Raises ValueError where there is
    no such table.
    """
    table = re.search(r"^\| Measure +\| Limit +\|\n\|[-: |]+\|\n((?:\|.*\|\n?)+)", text, re.MULTILINE)
    if table is None:
        raise ValueError(
            "no table with the head '| Measure | Limit |' was found; CONTRIBUTING.md states the limits in one"
        )
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table[1].splitlines()]
    return {name: int(limit.replace(",", "")) for name, limit in rows}


def measure_structure(package: structure.Package, longest: int) -> list[Measure]:
    """What the syntax trees say. `longest`: lines from which on a function is listed as too long."""
    files = sorted(package.values(), key=lambda module: -module.lines)
    functions = sorted(structure.functions(package), key=lambda function: -function.lines)
    long = [_place(function) for function in functions if function.lines > longest]
    imports = structure.imports(package)
    circles = structure.circles(imports)
    closing = [
        f"{one.importer} -> {one.imported}, line {one.line}"
        for circle in circles
        for one in imports
        if one.kind == "import" and {one.importer, one.imported} <= set(circle)
    ]
    once = [f"{name} <- {caller}" for name, caller in structure.single_callers(package)]
    return [
        Measure("product lines", sum(module.lines for module in files)),
        Measure("files", len(files)),
        Measure("lines of the longest file", files[0].lines, str(files[0].path)),
        Measure(LONGEST_FUNCTION, functions[0].lines, _place(functions[0])),
        Measure("functions over that limit", len(long), listed=tuple(long)),
        Measure("circles among modules", len(circles), listed=tuple(dict.fromkeys(closing))),
        Measure("private functions with one caller", len(once), listed=tuple(once)),
    ]


def _place(function: structure.Function) -> str:
    return f"{function.module}.{function.name}, line {function.line}"


def measure_trace(trace: Trace) -> list[Measure]:
    """What a logging training step, the batch within it and the way to the loop open."""
    step, batch, _ = trace.step()
    reading, model = _of(batch, READING), _of(step, ("model",))
    rest = {ran for ran in step if ran.room not in APART}
    return [
        _files("files a step, outside model, data and tokens", rest),
        _functions("functions a step, outside model, data and tokens", rest),
        _files("files a batch, in data and tokens", reading),
        _functions("functions a batch, in data and tokens", reading),
        _files("files a step, in model", model),
        _functions("functions a step, in model", model),
        _files("files from the command to the loop", trace.start),
    ]


def locating_note(trace: Trace) -> str:
    """Whether the steps traced located a new block of rows, and what a batch opens that does."""
    if not trace.knows_locating():
        return f"whether the steps traced located a new block of rows is unknown: nothing in data/ is named {LOCATES}"
    said = (
        "the steps traced located a new block of rows"
        if trace.step()[2]
        else "the steps traced located no new block of rows"
    )
    locating = _of(trace.locating(), READING)
    more = (
        f"; a batch that does opens {len(_file_names(locating))} files and {len(locating)} functions in data and tokens"
    )
    return said + (more if locating else "")


def _of(ran: Iterable[Ran], rooms: Collection[str]) -> set[Ran]:
    return {one for one in ran if one.room in rooms}


def _file_names(ran: Iterable[Ran]) -> list[str]:
    return sorted({one.file for one in ran})


def _files(name: str, ran: Iterable[Ran]) -> Measure:
    names = _file_names(ran)
    return Measure(name, len(names), listed=tuple(names))


def _functions(name: str, ran: Collection[Ran]) -> Measure:
    return Measure(name, len(ran), listed=tuple(f"{one.file}:{one.line} {one.function}" for one in sorted(ran)))


def by_room(step: Iterable[Ran]) -> dict[str, tuple[int, int]]:
    """room -> (files, functions) of a step."""
    rooms: dict[str, set[Ran]] = {}
    for ran in step:
        rooms.setdefault(ran.room, set()).add(ran)
    return {room: (len(_file_names(ran)), len(ran)) for room, ran in sorted(rooms.items())}


def over(measures: Iterable[Measure], limits: Mapping[str, int]) -> list[str]:
    """Names of the measures that are over their limit. Raises ValueError for a limit on what is not measured: it would
    hold nothing.
    """
    found = {measure.name: measure.found for measure in measures}
    if unknown := [name for name in limits if name not in found]:
        raise ValueError(
            f"a limit is stated for {unknown[0]!r}, which is not measured; measured are: {', '.join(found)}"
        )
    return [name for name, value in found.items() if name in limits and value > limits[name]]


def table(measures: Sequence[Measure], limits: Mapping[str, int], *, verbose: bool) -> str:
    """One line a measure: name, found, limit, what is over, what to name."""
    width = max(len(measure.name) for measure in measures)
    beyond = over(measures, limits)
    lines = [f"{'':{width}}  measured   limit"]
    for measure in measures:
        limit = f"{limits[measure.name]:,}" if measure.name in limits else "-"
        told = "  ".join(text for text in ("OVER" if measure.name in beyond else "", measure.named) if text)
        lines.append(f"{measure.name:{width}}  {measure.found:>8,}  {limit:>6}  {told}".rstrip())
        if verbose:
            lines += [f"    {item}" for item in measure.listed]
    return "\n".join(lines)


def room_table(rooms: Mapping[str, tuple[int, int]]) -> str:
    rows = [f"  {room:12}  {files:>5}  {functions:>9}" for room, (files, functions) in rooms.items()]
    return "\n".join([f"{'a step, by room':14}  files  functions", *rows])


def as_json(measures: Sequence[Measure], limits: Mapping[str, int], trace: Trace) -> dict[str, Any]:
    """The table, the rooms and the note as one document."""
    rows = [
        {
            "name": one.name,
            "measured": one.found,
            "limit": limits.get(one.name),
            "named": one.named,
            "listed": one.listed,
        }
        for one in measures
    ]
    return {
        "measures": rows,
        "rooms": {
            room: {"files": files, "functions": functions}
            for room, (files, functions) in by_room(trace.step()[0]).items()
        },
        "note": locating_note(trace),
        "over": over(measures, limits),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a measure is over its limit."""
    parser = argparse.ArgumentParser(prog="python -m tools.size", description=__doc__)
    parser.add_argument(
        "--root",
        type=Path,
        default=ROOT,
        metavar="DIR",
        help="repository to measure (default: this one), by this one's limits",
    )
    parser.add_argument("--verbose", action="store_true", help="list the files and functions behind each figure")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(argv)
    folder = options.root.resolve() / "argonne"
    if not folder.is_dir():
        parser.error(f"--root {options.root}: holds no folder argonne; give the repository's root")
    limits = read_limits((ROOT / "CONTRIBUTING.md").read_text())
    trace = trace_run(folder)
    measures = measure_structure(structure.read_package(folder), limits[LONGEST_FUNCTION]) + measure_trace(trace)
    if options.json:
        print(json.dumps(as_json(measures, limits, trace), indent=2))
    else:
        print(
            table(measures, limits, verbose=options.verbose),
            room_table(by_room(trace.step()[0])),
            locating_note(trace),
            sep="\n\n",
        )
    return 1 if over(measures, limits) else 0


if __name__ == "__main__":
    sys.exit(main())
