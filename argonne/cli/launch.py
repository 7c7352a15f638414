"""launch: jobs that go on from one another until their runs are complete."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from argonne.cli.command import Verbs, add_keys, build_parser, chosen
from argonne.cli.train import check_data, check_verb, recipe_of
from argonne.errors import InputError
from argonne.parallel.scripts import LaunchOptions, Leg, hand_in, script_of

# Flags of a training verb that are the chain's to say, or that a second job must not repeat.
NOT_REPEATED = ("run", "init_from", "rewind", "take_over", "dry_run")


def add_verbs(verb: Verbs, arguments: Sequence[str]) -> None:
    launch = verb("launch", launch_chain)
    launch.add_argument("scheduler", choices=("slurm", "pbs"), metavar="slurm|pbs")
    launch.add_argument(
        "recipes",
        nargs="+",
        metavar="RECIPE",
        help="packaged names or TOML files, one after the other, each from the former's run; --section.key VALUE, and "
        "the flags of a training verb behind --, are for all",
    )
    launch.add_argument(
        "--run", nargs="+", type=Path, metavar="DIR", help="run folder of each recipe (default: runs/RECIPE)"
    )
    launch.add_argument("--init-from", metavar="MODEL", help="weights that the first recipe starts from")
    launch.add_argument("--dry-run", action="store_true", help="print the job's script and stop")
    add_keys(launch, LaunchOptions)


def launch_chain(options: argparse.Namespace) -> None:
    settings: LaunchOptions = chosen(LaunchOptions, options)
    legs = legs_of(options)
    again = shlex.join(["argonne", *(word for word in options.parser.given if word != "--dry-run")])
    script = script_of(options.scheduler, legs, settings, again)
    if options.dry_run:
        print(script, end="")
        return
    for leg in legs:
        print(f"{leg.folder}: argonne {shlex.join(leg.arguments)}", file=sys.stderr)
    if (identifier := hand_in(options.scheduler, legs, script)) is not None:
        print(identifier)


def legs_of(options: argparse.Namespace) -> list[Leg]:
    """The runs of the chain, with everything checked that can be before they run."""
    from argonne.recipe import recipe_name

    folders = options.run or [Path("runs") / recipe_name(name) for name in options.recipes]
    if len(folders) != len(options.recipes) or len(set(folders)) != len(folders):
        raise InputError(
            f"--run: found {', '.join(map(str, folders))} for {len(options.recipes)} recipes, expected one for each"
        )
    legs: list[Leg] = []
    for name, folder in zip(options.recipes, folders, strict=True):
        try:
            legs.append(leg_of(name, folder, legs[-1].folder if legs else None, options))
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return legs


def leg_of(name: str, folder: Path, former: Path | None, options: argparse.Namespace) -> Leg:
    """One recipe's command. It starts from the former's run, unless it says itself from what, or begins fresh."""
    from argonne.plan.shape import as_trained, weights_on_disk

    asked = parsed("pretrain", name, options.rest)
    for flag in NOT_REPEATED:
        if getattr(asked, flag) not in (None, False):
            instead = "run the verb once yourself" if flag in ("rewind", "take_over") else "give it before the --"
            raise InputError(f"--{flag.replace('_', '-')}: is not for each job of a chain; {instead}")
    if former is not None and asked.resume_from is not None:
        raise InputError("--resume-from: is for the run of one recipe; launch the others after it")
    recipe = recipe_of(asked)
    start = said = recipe.model.init_from
    if former is None:
        start = options.init_from or said
    elif "model.init_from" not in recipe.given and (said is not None or recipe.stage != "pretrain"):
        start = str(former)
    verb = "continue" if recipe.stage == "pretrain" and start is not None else recipe.stage
    more = [*(["--init-from", start] if start is not None and start != said else []), *options.rest]
    asked = parsed(verb, name, more)
    recipe = recipe_of(asked)
    check_verb(asked, recipe)
    if start != str(former):
        if start is not None and start.startswith("runs/") and weights_on_disk(start) is None:
            raise InputError(
                f"model.init_from: {start} has no weights; train it first, or put its recipe into the chain"
            )
        as_trained(recipe)
    if not folder.exists():
        check_data(recipe, folder)
    return Leg(folder, [verb, name, "--run", str(folder), *more])


def parsed(verb: str, name: str, more: list[str]) -> argparse.Namespace:
    """What the parser of a training verb makes of its arguments."""
    options, rest = build_parser([verb]).parse_known_args([verb, name, *more])
    options.rest = rest
    return options
