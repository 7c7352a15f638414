"""train, demo, models, plan: what one begins with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from argonne.cli.command import Verbs, json_flag, parse_overrides, progress_bar, recipe_argument, show
from argonne.config import Recipe
from argonne.errors import InputError, Stopped

if TYPE_CHECKING:
    from argonne.plan import Plan


def add_verbs(verb: Verbs, arguments: Sequence[str]) -> None:
    train = verb("train", train_on_text, epilog="Each recipe key is also a flag: --train.steps 1000, --seed 1.")
    train.add_argument("text", nargs="+", metavar="TEXT", help="files, folders, patterns; jsonl, parquet, arrow, txt")
    train.add_argument(
        "--out", type=Path, default=Path("trained"), metavar="DIR", help="folder for everything it makes"
    )
    train.add_argument("--hours", type=float, metavar="H", help="to train for (default: 0.5 on a CPU, 1 on a GPU)")
    train.add_argument("--tokenizer", metavar="DIR", help="one to take (default: one is trained on the text)")
    train.add_argument("--dry-run", action="store_true", help="print the size and the recipe that it would take")
    demo = verb("demo", show_demo)
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything it makes")
    demo.add_argument("--seed", type=int, default=Recipe.seed, metavar="N", help="of weights, lessons and their order")
    json_flag(verb("models", list_models))
    plan = verb("plan", plan_run)
    recipe_argument(plan)
    plan.add_argument("--gpu", metavar="NAME", help="device, as h200 (default: cpu for small models, h200 otherwise)")
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="devices")
    plan.add_argument("--price", type=float, metavar="P", help="price of a device for an hour")
    plan.add_argument("--measure", action="store_true", help="train a few steps here, and tell which way is fastest")
    json_flag(plan)


def train_on_text(options: argparse.Namespace) -> None:
    from argonne.stages.first import Asked, run_first

    overrides = parse_overrides(options.rest)
    asked = Asked(tuple(options.text), options.out, options.hours, options.tokenizer, overrides)
    try:
        run_first(asked, dry_run=options.dry_run, started=options.started)
    except KeyboardInterrupt:  # before training listens; all that was done is found again
        raise Stopped(f"stopped; the same command goes on in {options.out}") from None


def show_demo(options: argparse.Namespace) -> None:
    from argonne.stages.demo import run_demo

    run_demo(options.out, seed=options.seed)


def list_models(options: argparse.Namespace) -> None:
    from argonne.model.build import describe_presets

    rows = describe_presets()
    columns = ("name", "parameters", "layers", "hidden", "heads", "kv_heads", "head_dim", "context", "vocabulary")
    table = [
        columns,
        *([f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in columns] for row in rows),
    ]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    lines = ["  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in table]
    show(rows, "\n".join(lines), as_json=options.json)


def plan_run(options: argparse.Namespace) -> None:
    from argonne.plan import make_plan, plan_lines
    from argonne.recipe import load_recipe, recipe_names

    recipe = load_recipe(options.recipe, parse_overrides(options.rest))
    name = options.recipe if options.recipe in recipe_names() else None
    if options.measure:
        plan = _measured_plan(recipe, options)
    else:
        plan = make_plan(recipe, gpu=options.gpu, gpus=options.gpus, price=options.price, name=name)
        show(plan.to_dict(), "\n".join(plan_lines(plan)), as_json=options.json)
    if plan.refusals:
        raise InputError(f"{options.recipe}: the run will be refused: {plan.refusals[0]}")


def _measured_plan(recipe: Recipe, options: argparse.Namespace) -> Plan:
    """Show the plan for this machine with what was measured on it."""
    for flag, unsaid in (("gpu", None), ("gpus", 1), ("price", None)):
        if getattr(options, flag) != unsaid:
            raise InputError(f"--{flag}: --measure runs on one device of this machine; leave one of them out")
    from argonne.parallel.neighbours import beside_others
    from argonne.plan import plan_lines
    from argonne.stages.trial import measure, trial_lines

    tell = partial(print, file=sys.stderr, flush=True)  # measuring turns sys.stderr aside
    with progress_bar("ways to train") as progress, beside_others(tell):
        plan, trials = measure(recipe, progress)
    found = {**plan.to_dict(), "measured": [asdict(trial) for trial in trials]}
    show(found, "\n".join([*plan_lines(plan), *trial_lines(trials)]), as_json=options.json)
    return plan
