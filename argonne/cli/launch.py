"""launch, rehearse: jobs that go on from one another until their runs are complete; the same chain, small, before."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from argonne.cli.command import Parser, Verbs, add_keys, build_parser, chosen
from argonne.cli.train import check_data, check_verb, recipe_of
from argonne.errors import InputError
from argonne.keys import parse_duration
from argonne.parallel.scripts import LaunchOptions, Leg, hand_in, script_of

if TYPE_CHECKING:
    from argonne.rehearse.checks import Machine

# Flags of a training verb that are the chain's to say, or that a second job must not repeat.
NOT_REPEATED = ("run", "init_from", "rewind", "take_over", "dry_run")


def add_verbs(verb: Verbs, arguments: Sequence[str]) -> None:
    launch = verb("launch", launch_chain)
    launch.add_argument("scheduler", choices=("slurm", "pbs"), metavar="slurm|pbs")
    chain_flags(launch)
    launch.add_argument("--dry-run", action="store_true", help="print the job's script and stop")
    launch.add_argument("--rehearse", action="store_true", help="hand in nothing before `argonne rehearse` has passed")
    launch.add_argument("--gpu", metavar="NAME", help="with --rehearse: the card, as in plan")
    add_keys(launch, LaunchOptions)
    rehearse = verb("rehearse", rehearse_chain)
    chain_flags(rehearse)
    rehearse.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs of the real run, on all its nodes")
    rehearse.add_argument("--gpu", metavar="NAME", help="the card, as in plan: does the real run fit its memory?")
    rehearse.add_argument("--time", metavar="T", help="what a job of the real run gets: its first save comes before")


def chain_flags(parser: Parser) -> None:
    parser.add_argument(
        "recipes",
        nargs="+",
        metavar="RECIPE",
        help="packaged names or TOML files, one after the other, each from the former's run; --section.key VALUE, and "
        "the flags of a training verb behind --, are for all",
    )
    parser.add_argument(
        "--run", nargs="+", type=Path, metavar="DIR", help="run folder of each recipe (default: runs/RECIPE)"
    )
    parser.add_argument("--init-from", metavar="MODEL", help="weights that the first recipe starts from")


def launch_chain(options: argparse.Namespace) -> None:
    settings: LaunchOptions = chosen(LaunchOptions, options)
    if options.gpu is not None and not options.rehearse:
        raise InputError("--gpu: is for --rehearse; add that, or leave it out")
    legs = legs_of(options)
    again = shlex.join(["argonne", *(word for word in options.parser.given if word != "--dry-run")])
    script = script_of(options.scheduler, legs, settings, again)
    if options.dry_run:
        print(script, end="")
        return
    if options.rehearse:
        from argonne.rehearse.checks import Machine

        seconds = parse_duration(settings.jobs.time, "--time") if settings.jobs.time else None
        notice = parse_duration(settings.stop_before, "--stop-before")
        rehearsed(legs, Machine(settings.gpus * settings.nodes, options.gpu, seconds and seconds - notice))
    for leg in legs:
        print(f"{leg.folder}: argonne {shlex.join(leg.arguments)}", file=sys.stderr)
    if (identifier := hand_in(options.scheduler, legs, script)) is not None:
        print(identifier)


def rehearse_chain(options: argparse.Namespace) -> None:
    if options.gpus < 0:
        raise InputError(f"--gpus: found {options.gpus}, expected at least 0")
    try:
        legs = legs_of(options)
    except InputError as error:
        raise InputError(f"rehearsal: the check of {error}") from None
    from argonne.rehearse.checks import Machine

    seconds = parse_duration(options.time, "--time") if options.time else None
    print("\n".join(rehearsed(legs, Machine(options.gpus, options.gpu, seconds))))


def rehearsed(legs: list[Leg], machine: Machine) -> list[str]:
    """Rehearse a chain; what to know of it afterwards, in lines."""
    from argonne.rehearse.chain import Part, rehearse, summary

    parts: list[Part] = []
    for leg in legs:
        verb, name, *_ = leg.arguments
        asked = parsed(verb, name, leg.arguments[4:])
        if asked.resume_from is not None:
            raise InputError("--resume-from: a whole state is as large as the real run; rehearse with --init-from it")
        recipe = recipe_of(asked)
        starts = [number for number, part in enumerate(parts) if str(part.folder) == recipe.model.init_from]
        flags = ("--allow", *asked.allow) if asked.allow else ()
        parts.append(Part(name, verb, recipe, leg.folder, flags, starts[-1] if starts else None))
    return summary(rehearse(parts, machine, lambda text: print(text, file=sys.stderr, flush=True)))


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
    from argonne.plan.build import check_length
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
        if asked.resume_from is None:
            check_length(recipe)
        check_data(recipe, folder)
    return Leg(folder, [verb, name, "--run", str(folder), *more])


def parsed(verb: str, name: str, more: list[str]) -> argparse.Namespace:
    """What the parser of a training verb makes of its arguments."""
    options, rest = build_parser([verb]).parse_known_args([verb, name, *more])
    options.rest = rest
    return options
