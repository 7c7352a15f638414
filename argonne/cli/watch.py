"""runs, report, inspect: look at what lies on disk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from argonne.cli.command import Verbs, json_flag, show
from argonne.errors import InputError


def add_verbs(verb: Verbs, arguments: Sequence[str]) -> None:
    runs = verb("runs", list_all)
    runs.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs (default: runs)"
    )
    json_flag(runs)
    report = verb("report", write_page)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run")
    report.add_argument(
        "--watch", action="store_true", help="write the page again when the records grow, until no run lives"
    )
    inspect = verb("inspect", inspect_artifact)
    inspect.add_argument("path", type=Path, metavar="PATH", help="token set, run, checkpoint or exported model")
    inspect.add_argument(
        "--results",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder of eval --out that is said to be of it, as often as there are such",
    )
    inspect.add_argument(
        "--public-key", type=Path, metavar="KEY.pub", help="check the signature of the folder (model.sig) by this key"
    )
    json_flag(inspect)


def list_all(options: argparse.Namespace) -> None:
    from argonne.report.runs import list_runs, runs_table

    rows = list_runs(options.folder)
    show(rows, runs_table(rows), as_json=options.json)


def write_page(options: argparse.Namespace) -> None:
    from argonne.report.report import watch_report, write_report

    print((watch_report if options.watch else write_report)(options.runs, options.out))


def inspect_artifact(options: argparse.Namespace) -> None:
    from argonne.report.inspect import inspect_path, render

    facts = inspect_path(options.path, options.results)
    if options.public_key is not None:
        from argonne.publish.signature import verify

        found = verify(options.path, options.public_key)
        facts["signature"] = f"not that of {options.public_key}" if found else f"verified by {options.public_key}"
        facts["problems"] += found
    show(facts, render(facts), as_json=options.json)
    if facts["problems"]:
        raise InputError(f"{options.path}: does not verify: {facts['problems'][0]} ({len(facts['problems'])} problems)")
