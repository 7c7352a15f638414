"""runs, report, inspect: look at what lies on disk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from argonne import layout
from argonne.cli.command import Verbs, json_flag, print_json
from argonne.errors import InputError


def add_verbs(verb: Verbs, arguments: Sequence[str]) -> None:
    runs = verb("runs", "what is running, stopped, failed and complete", list_all)
    runs.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs (default: runs)"
    )
    json_flag(runs)
    report = verb("report", "one self-contained HTML page with plots, of one run or several compared", write_page)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run")
    inspect = verb("inspect", "say what an artifact is, verify its hashes, show its lineage", inspect_artifact)
    inspect.add_argument("path", type=Path, metavar="PATH", help="token set, run, checkpoint or exported model")
    json_flag(inspect)


def list_all(options: argparse.Namespace) -> None:
    from argonne.report.runs import list_runs, runs_table

    rows = list_runs(options.folder)
    if options.json:
        print_json(rows)
    else:
        print(runs_table(rows))


def write_page(options: argparse.Namespace) -> None:
    for run in options.runs:
        layout.metrics_of(run)  # before matplotlib is loaded
    from argonne.report.report import write_report

    print(write_report(options.runs, options.out))


def inspect_artifact(options: argparse.Namespace) -> None:
    from argonne.report.inspect import inspect_path, render

    facts = inspect_path(options.path)
    if options.json:
        print_json(facts)
    else:
        print(render(facts))
    if facts["problems"]:
        raise InputError(f"{options.path}: damaged: {facts['problems'][0]} ({len(facts['problems'])} problems)")
