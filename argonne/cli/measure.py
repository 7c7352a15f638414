"""eval, compare: measure a model, and several in pairs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.cli.command import Verbs, json_flag, model_argument, progress_bar, quantize_flag, show
from argonne.errors import InputError

OWN_TASKS = ("bpb", "gsm8k", "gsm8k_base", "sums", "turns", "probes")
# Benchmarks whose answers are given, each with files of its own.
GIVEN_ANSWERS = ("mmlu", "hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "lambada")
OWN_FILES = ("gsm8k", "gsm8k_base", *GIVEN_ANSWERS)  # --data may hold folders of theirs by name
HARNESS = "lm_eval:"  # before the name of a task that lm-evaluation-harness knows
NAMES = f"comma-separated: {', '.join((*OWN_TASKS, *GIVEN_ANSWERS))}; or {HARNESS}TASK"
WRITTEN = ("gsm8k", "gsm8k_base", "sums", "turns")
# Flags of eval that act on some tasks only.
NEEDS = {
    "data": ("bpb", "probes", *OWN_FILES),
    "limit": ("bpb", *WRITTEN, *GIVEN_ANSWERS),
    "shots": ("mmlu", "gsm8k_base"),
    "before": ("probes",),
    "page": ("probes",),
    "tokens": ("probes", *WRITTEN),
    "samples": WRITTEN,
    "contamination": OWN_FILES,
}


def add_verbs(verb: Verbs, arguments: Sequence[str]) -> None:
    evaluate = verb("eval", evaluate_model)
    model_argument(evaluate)
    evaluate.add_argument("--tasks", default="bpb", help=NAMES)
    evaluate.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="bpb: a token set or text (default: the run's own held-out part); probes: a file with one question a "
        "line; the others: the folder of the benchmark's own files, or one that holds such folders by name",
    )
    evaluate.add_argument(
        "--baselines", action="store_true", help="with bpb: uniform, unigram, bigram and xz on the same text beside it"
    )
    evaluate.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="bpb: whole documents of at most so many tokens (default: 1,000,000); the others: so many questions",
    )
    evaluate.add_argument("--before", metavar="MODEL", help="probes: another model's answers beside these")
    evaluate.add_argument("--page", type=Path, metavar="FILE", help="probes: the answers side by side as HTML")
    evaluate.add_argument("--tokens", type=int, metavar="N", help="tokens of an answer at most")
    evaluate.add_argument(
        "--samples", type=int, default=0, metavar="K", help="gsm8k, gsm8k_base, sums, turns: K sampled answers too"
    )
    evaluate.add_argument(
        "--shots",
        type=int,
        metavar="N",
        help="mmlu: examples in the prompt, 0 to 5 (default: 0); gsm8k_base: 0 to 8 (default: 5)",
    )
    evaluate.add_argument(
        "--contamination",
        action="store_true",
        help="look for the questions in what the model and those before it were trained on: the score with and without",
    )
    evaluate.add_argument(
        "--nproc", type=int, default=1, metavar="N", help="processes that share the questions, a card each (default: 1)"
    )
    evaluate.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="keep answers there as they come, and the results; the same command goes on from a killed one's",
    )
    quantize_flag(evaluate)
    json_flag(evaluate)
    compare = verb("compare", compare_models)
    compare.add_argument(
        "models", nargs="+", metavar="MODEL", help="the first against each other one; or folders of `eval --out`"
    )
    compare.add_argument("--tasks", required=True, help="comma-separated, as in eval")
    compare.add_argument("--data", type=Path, metavar="DIR", help="what the tasks read, as in eval")
    compare.add_argument("--limit", type=int, metavar="N", help="as in eval")
    compare.add_argument("--shots", type=int, metavar="N", help="as in eval")
    compare.add_argument("--out", type=Path, metavar="DIR", help="keep answers and results of each model there")
    compare.add_argument("--page", type=Path, metavar="FILE", help="the items on which they differ, as HTML")
    json_flag(compare)


def evaluate_model(options: argparse.Namespace) -> None:
    tasks = options.tasks.split(",")
    if any(name.startswith(HARNESS) for name in tasks):
        _by_harness(options, tasks)
        return
    for flag, needed in NEEDS.items() if {*tasks} <= {*OWN_TASKS, *GIVEN_ANSWERS} else ():
        if getattr(options, flag) and not {*needed} & {*tasks}:
            raise InputError(
                f"--{flag}: is for --tasks {' or '.join(needed)}, found --tasks {options.tasks}; add one, or leave "
                "it out"
            )
    readers = [name for name in tasks if name in NEEDS["data"]]
    if options.data and len(readers) > 1 and not {*readers} <= {*OWN_FILES}:
        raise InputError(
            f"--data: {' and '.join(readers)} read different things; measure them in commands of their own"
        )
    if options.nproc < 1:
        raise InputError(f"--nproc: found {options.nproc}, expected at least 1")
    models = [options.before, options.model] if options.before else [options.model]
    for name in models:
        layout.check_model_name(name)  # before torch is loaded
    from argonne.evaluate.run import evaluate, render

    results = []
    for number, name in enumerate(models, 1):
        asked = tasks if number == len(models) else ["probes"]
        with progress_bar("requests") as progress, progress_bar("bytes") as read:
            how: dict[str, Any] = {"tokens": options.tokens, "samples": options.samples, "progress": progress}
            how |= {
                "contamination": read if options.contamination and number == len(models) else None,
                "nproc": options.nproc,
                "int8": options.quantize == "int8",
                "out": options.out if number == len(models) else None,
            }
            results.append(evaluate(name, asked, options.data, options.shots, limit=options.limit, **how))
    for found in results:  # thousands of items: --out keeps them
        for values in found["tasks"].values():
            values.pop("items", None)
    found = {**results[-1], "before": results[0]} if options.before else results[0]
    others = _baselines(found, options.limit) if options.baselines else None
    text = "\n".join(map(render, results))
    if others:
        beside = ", ".join(f"{name} {others[name]:.4f}" for name in ("uniform", "unigram", "bigram", "xz"))
        text += f"\n    beside it: {beside} bits per byte on the same text"
    if "probes" in tasks:
        text += "\n\n" + _answers(results, options.page)
    show({**found, "baselines": others} if others else found, text, as_json=options.json)


def _by_harness(options: argparse.Namespace, tasks: list[str]) -> None:
    if own := [name for name in tasks if not name.startswith(HARNESS)]:
        raise InputError(f"--tasks: found {own[0]} beside tasks of {HARNESS}; measure it in a command of its own")
    for flag in ("before", "page", "tokens", "samples", "baselines", "contamination", "out"):
        if getattr(options, flag):
            raise InputError(f"--{flag}: is not for tasks of {HARNESS}, which lm-evaluation-harness runs; leave it out")
    if options.nproc != 1:
        raise InputError(f"--nproc: found {options.nproc}, expected 1 with tasks of {HARNESS}; leave it out")
    layout.check_model_name(options.model)
    from argonne.evaluate.other_benchmarks import by_harness, lines

    with progress_bar("requests") as progress:
        how: dict[str, Any] = {"limit": options.limit, "int8": options.quantize == "int8", "progress": progress}
        found = by_harness(options.model, tasks, options.data, options.shots, **how)
    told = [line for task, values in found["tasks"].items() for line in lines(task, values)]
    show(found, "\n".join([f"{found['model']}: {found['parameters']:,} parameters", *told]), as_json=options.json)


def compare_models(options: argparse.Namespace) -> None:
    if len(options.models) < 2:
        raise InputError(f"compare: found {len(options.models)} model, expected at least 2")
    from argonne.evaluate import compare
    from argonne.evaluate.requests import Task
    from argonne.evaluate.run import evaluate

    tasks, results = options.tasks.split(","), list[dict[str, Any]]()

    def before(task: Task) -> None:
        if not results and hasattr(task, "size"):
            print(compare.visible_before(task.name, task.size), file=sys.stderr, flush=True)

    for number, name in enumerate(options.models):
        if (kept := compare.stored(Path(name))) is not None:
            results.append(kept)
            continue
        layout.check_model_name(name)
        out = options.out / f"{number}-{Path(name).name}" if options.out else None
        with progress_bar("requests") as progress:
            how: dict[str, Any] = {"limit": options.limit, "out": out, "begins": before, "progress": progress}
            results.append(evaluate(name, tasks, options.data, options.shots, **how))
    rows = compare.compared(results, tasks)
    if options.page is not None:
        from argonne.report.compare_page import write_compare_page

        write_compare_page(options.page, rows)
    show({"comparisons": rows}, "\n".join(compare.lines(rows)), as_json=options.json)


def _answers(results: Sequence[dict[str, Any]], file: Path | None) -> str:
    """What every model answered, greedy and sampled, side by side; as a page too."""
    from argonne.evaluate.probes import MODES, side_by_side

    named = ["before", "after"] if len(results) > 1 else [""]
    columns = {
        f"{name} {mode}".strip(): found["tasks"]["probes"][mode]
        for mode in MODES
        for name, found in zip(named, results, strict=True)
    }
    if file is not None:
        from argonne.report.probes_page import write_probes_page

        write_probes_page(file, columns)
    return side_by_side({name: values["probes"] for name, values in columns.items()})


def _baselines(found: dict[str, Any], limit: int | None) -> dict[str, Any]:
    from argonne.evaluate.run import baseline_results
    from argonne.tokens.tokenizer import load_tokenizer

    data = Path(found["tasks"]["bpb"]["data"]) if "bpb" in found["tasks"] else None
    if data is None or not (data / layout.TOKENIZER).is_dir():
        raise InputError(
            "--baselines: they are fitted on a token set's training part; use --tasks bpb and --data a folder of "
            "`argonne prepare`"
        )
    return baseline_results(data, load_tokenizer(data / layout.TOKENIZER), limit=limit)
