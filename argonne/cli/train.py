"""pretrain, continue, midtrain, sft, cot-sft, dpo: from data to a model."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from argonne.cli.command import Verbs, parse_overrides, recipe_argument
from argonne.config import CHAT_STAGES, Recipe
from argonne.errors import InputError, Stopped

# What a verb trains.
STAGES = {
    "pretrain": ("pretrain", "midtrain"),
    "continue": ("pretrain", "midtrain"),
    "midtrain": ("midtrain",),
    "sft": ("sft",),
    "cot-sft": ("cot-sft",),
    "dpo": ("dpo",),
}
# Flags that are recipe keys under a shorter name.
SHORT = {"init_from": "model.init_from", "wall_time": "stop.wall_time", "deadline": "stop.deadline"}


def add_verbs(verb: Verbs, arguments: Sequence[str]) -> None:
    asked = arguments[:1] and arguments[0] in STAGES and {"-h", "--help"} & set(arguments)
    epilog = keys_help() if asked else None
    for name in STAGES:
        parser = verb(name, train_model, epilog=epilog)
        recipe_argument(parser)
        parser.add_argument(
            "--run", type=Path, metavar="DIR", help="run folder (default: runs/RECIPE); an existing run is resumed"
        )
        parser.add_argument(
            "--init-from", metavar="MODEL", help="weights to start from: run, checkpoint, model folder or Hub id"
        )
        parser.add_argument(
            "--resume-from",
            type=Path,
            metavar="CHECKPOINT",
            help="start a new run from the whole state of a checkpoint, or of a .pt",
        )
        parser.add_argument(
            "--data-from-start",
            action="store_true",
            help="with a .pt: begin the data at its start, where its position cannot be carried over",
        )
        parser.add_argument(
            "--allow",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY",
            help="keys that may differ from the run's on resume; memory: start though the plan does not fit",
        )
        parser.add_argument("--rewind", type=int, metavar="N", help="go back to the run's own checkpoint of step N")
        parser.add_argument("--take-over", action="store_true", help="the machine that has the run is surely dead")
        parser.add_argument("--wall-time", metavar="T", help="stop and save after this long: 90m, 12h, 1-12:00:00")
        parser.add_argument("--deadline", metavar="T", help="stop and save before this moment")
        parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
        parser.add_argument("--profile", action="store_true", help="write a trace of a few steps into the run")


def keys_help() -> str:
    """Every recipe key with its meaning, and the packaged recipes."""
    from argonne.keys import all_keys
    from argonne.recipe import recipe_names

    lines = ["recipe keys, each also --section.key VALUE:"]
    for path, item in all_keys().items():
        choices = ", ".join(item.metadata.get("choices") or ())
        lines.append(f"  --{path:36} {item.metadata['meaning']}{f' ({choices})' if choices else ''}")
    return "\n".join([*lines, "", "packaged recipes: " + ", ".join(recipe_names())])


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe that a training verb's flags say."""
    from argonne.recipe import load_recipe

    given = {
        path: json.dumps(str(getattr(options, flag)))
        for flag, path in SHORT.items()
        if getattr(options, flag) is not None
    }
    return load_recipe(options.recipe, {**parse_overrides(options.rest), **given})


def check_verb(options: argparse.Namespace, recipe: Recipe) -> None:
    """Raise InputError where the verb does not train such a recipe, or has nothing to start from."""
    if recipe.stage not in STAGES[options.verb]:
        verbs = [verb for verb, stages in STAGES.items() if recipe.stage in stages]
        instead = f", or use argonne {verbs[0]}" if verbs else ""
        raise InputError(
            f"stage: the recipe says {recipe.stage!r}, and argonne {options.verb} trains "
            f"{' or '.join(STAGES[options.verb])}; give such a recipe{instead}"
        )
    if options.verb != "pretrain" and recipe.model.init_from is None and options.resume_from is None:
        raise InputError(
            f"{options.verb}: no weights to start from; give --init-from MODEL or model.init_from in the recipe"
        )


def check_data(recipe: Recipe, folder: Path) -> None:
    """A new run's data, before torch is loaded. Raises InputError naming what is not there."""
    if recipe.stage in CHAT_STAGES:
        from argonne.prepare.documents import find_files

        for source in recipe.data.sources:
            find_files([source.path])
    else:
        from argonne.tokens.formats import open_tokens

        for source in recipe.data.sources:
            open_tokens(source.path)
    if recipe.data.input:
        from argonne.prepare.from_text import options_of
        from argonne.tokens.tokenizer import load_tokenizer

        load_tokenizer(options_of(recipe.data, folder).tokenizer or "")


def train_model(options: argparse.Namespace) -> None:
    from argonne.plan.build import check_length
    from argonne.plan.shape import as_trained
    from argonne.recipe import recipe_name, to_toml
    from argonne.train.guard import StopWatch

    recipe = recipe_of(options)
    check_verb(options, recipe)
    if options.dry_run:
        print(to_toml(as_trained(recipe)), end="")
        return
    if {"NNODES", "SLURM_STEP_NUM_TASKS"} & os.environ.keys():
        from argonne.parallel.nodes import join

        join(os.environ)
    folder = options.run or Path("runs") / recipe_name(options.recipe)
    # A finished run needs no data; of several nodes, or torchrun's workers, the first alone may have it.
    if not folder.exists() and "RANK" not in os.environ and os.environ.get("NODE_RANK", "0") == "0":
        if options.resume_from is None:  # else what was trained before counts too
            check_length(recipe)
        check_data(recipe, folder)
    watch = StopWatch(recipe.stop, started=options.started)
    with watch.listening():  # already while torch is loaded
        from argonne.stages.ending import finish_or_stop
        from argonne.stages.pretrain import run

        names = ("resume_from", "allow", "profile", "data_from_start", "rewind", "take_over")
        how = {name: getattr(options, name) for name in names}
        try:
            result = run(recipe, folder, watch=watch, **how)
            finish_or_stop(result.outcome, folder)
        except Stopped as stopped:
            if "RANK" not in os.environ:
                raise
            # To torchrun and srun any other code than 0 is a failure, for which they end the others.
            print(f"argonne: {stopped}", file=sys.stderr)
