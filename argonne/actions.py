"""What each verb does: take the parsed options, call one function, print what it says. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.errors import InputError


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def show_demo(options: argparse.Namespace) -> None:
    from argonne.stages.demo import run_demo

    run_demo(options.out)


def list_models(options: argparse.Namespace) -> None:
    from argonne.model.describe import describe_presets

    rows = describe_presets()
    if options.json:
        print_json(rows)
        return
    columns = ("name", "parameters", "layers", "hidden", "heads", "kv_heads", "head_dim", "context", "vocabulary")
    table = [columns, *([f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in columns] for row in rows)]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    for line in table:
        print(
            "  ".join(
                cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        )


def train_tokenizer(options: argparse.Namespace) -> None:
    from argonne.prepare.planning import train_tokenizer_on_files

    patterns = tuple(options.input)
    print(
        train_tokenizer_on_files(
            patterns, options.vocab_size, options.out, bare=options.bare, text_column=options.text_column, split=options.split
        )
    )


def prepare_tokens(options: argparse.Namespace) -> None:
    import dataclasses

    from argonne.prepare.options import PrepareOptions
    from argonne.prepare.prepare import prepare

    known = {item.name for item in dataclasses.fields(PrepareOptions)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(options).items() if name in known
    }
    print(prepare(PrepareOptions(**values)))


def inspect_artifact(options: argparse.Namespace) -> int:
    from argonne.report.inspect import inspect_path, render

    facts = inspect_path(options.path)
    if options.json:
        print_json(facts)
    else:
        print(render(facts))
    if facts["problems"]:
        raise InputError(f"{options.path}: damaged: {facts['problems'][0]} ({len(facts['problems'])} problems)")
    return 0


def parse_overrides(rest: Sequence[str]) -> dict[str, str]:
    """`--section.key VALUE` and `--section.key=VALUE` as a dict. Raises InputError for anything else."""
    found: dict[str, str] = {}
    items = list(rest)
    while items:
        item = items.pop(0)
        if not item.startswith("--") or item == "--":
            raise InputError(f"unexpected argument {item!r}; recipe keys are given as --section.key VALUE")
        name, equals, value = item[2:].partition("=")
        if not equals:
            if not items:
                raise InputError(f"--{name}: a value is missing")
            value = items.pop(0)
        found[name] = value
    return found


def train_model(options: argparse.Namespace) -> int:
    from argonne.recipe import load_recipe, to_toml

    overrides = parse_overrides(options.rest)
    for flag, path in (("init_from", "model.init_from"), ("wall_time", "stop.wall_time"), ("deadline", "stop.deadline")):
        if getattr(options, flag) is not None:
            overrides[path] = json.dumps(str(getattr(options, flag)))
    recipe = load_recipe(options.recipe, overrides)
    if recipe.stage not in ("pretrain", "midtrain"):
        raise InputError(
            f"stage: {options.verb} trains on plain text, the recipe says {recipe.stage!r}; give a recipe of stage pretrain or midtrain"
        )
    if options.verb == "continue" and recipe.model.init_from is None and options.resume_from is None:
        raise InputError("continue: no weights to start from; give --init-from MODEL or model.init_from in the recipe")
    if options.dry_run:
        print(to_toml(recipe), end="")
        return 0
    from argonne.stages.pretrain import run
    from argonne.stages.session import finish_or_stop

    folder = options.run or Path("runs") / Path(options.recipe).stem
    result = run(
        recipe,
        folder,
        resume_from=options.resume_from,
        allow=options.allow,
        started=options.started,
        profile=options.profile,
        data_from_start=options.data_from_start,
    )
    finish_or_stop(result.outcome, folder)
    return 0


def generate_text(options: argparse.Namespace) -> None:
    from argonne.serve.engine import generate_text
    from argonne.serve.sampling import SamplingOptions

    sampling = SamplingOptions(options.max_new_tokens, options.temperature, options.top_k, options.top_p, options.seed)
    pieces = generate_text(options.model, options.prompt, sampling, device=options.device)
    first = next(pieces, "")  # loads the model: a message about it comes before the text
    print(options.prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def evaluate_model(options: argparse.Namespace) -> None:
    from argonne.evaluate.run import evaluate, render

    with progress_bar("requests") as progress:
        found = evaluate(options.model, options.tasks.split(","), options.data, options.shots, limit=options.limit, progress=progress)
    others = _baselines(found, options.limit) if options.baselines else None
    if options.json:
        print_json({**found, "baselines": others} if others else found)
        return
    print(render(found))
    if others:
        names = ("uniform", "unigram", "bigram", "xz")
        print("    beside it: " + ", ".join(f"{name} {others[name]:.4f}" for name in names) + " bits per byte on the same text")


def _baselines(found: dict[str, Any], limit: int | None) -> dict[str, Any]:
    from argonne.evaluate.run import baseline_results
    from argonne.tokens.tokenizer import load_tokenizer

    data = Path(found["tasks"]["bpb"]["data"]) if "bpb" in found["tasks"] else None
    if data is None or not (data / layout.TOKENIZER).is_dir():
        raise InputError(
            "--baselines: they are fitted on a token set's training part; use --tasks bpb and --data a folder of `argonne prepare`"
        )
    return baseline_results(data, load_tokenizer(data / layout.TOKENIZER), limit=limit)


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on a terminal, nothing elsewhere; called with (done, total)."""
    from tqdm import tqdm

    with tqdm(unit=unit, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False, dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def list_all(options: argparse.Namespace) -> None:
    from argonne.report.runs import list_runs, runs_table

    rows = list_runs(options.folder)
    if options.json:
        print_json(rows)
    else:
        print(runs_table(rows))


def tell(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
    else:
        print("\n".join(f"{name}: {value}" for name, value in facts.items()))


def import_earlier(options: argparse.Namespace) -> None:
    from argonne.legacy.convert import import_checkpoint

    tell(import_checkpoint(options.path, options.out, attention=options.attention), options.json)


def export_model(options: argparse.Namespace) -> None:
    if options.kind == "pt":
        from argonne.legacy.export_pt import export_pt

        tell(export_pt(Path(options.model), options.out), options.json)
        return
    from argonne.publish.export import export_model

    tell(export_model(Path(options.model), options.out, kind=options.kind), options.json)


def plan_run(options: argparse.Namespace) -> None:
    from argonne.plan import make_plan, plan_lines
    from argonne.recipe import load_recipe, recipe_names

    recipe = load_recipe(options.recipe, parse_overrides(options.rest))
    name = options.recipe if options.recipe in recipe_names() else None
    plan = make_plan(recipe, gpu=options.gpu, gpus=options.gpus, price=options.price, name=name)
    if options.json:
        print_json(plan.to_dict())
    else:
        print("\n".join(plan_lines(plan)))


def write_page(options: argparse.Namespace) -> None:
    from argonne.report.report import write_report

    print(write_report(options.runs, options.out))
