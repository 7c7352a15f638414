"""generate, chat, serve, eval: use and measure a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.cli.command import Verbs, add_keys, chosen, json_flag, model_argument, progress_bar, show
from argonne.errors import InputError, first_line
from argonne.serve.options import SamplingOptions, ServeOptions, Shaping

# Flags of eval that act on some tasks only.
NEEDS = {
    "data": ("bpb", "gsm8k", "probes"),
    "limit": ("bpb", "gsm8k", "sums", "turns"),
    "before": ("probes",),
    "page": ("probes",),
    "tokens": ("probes", "gsm8k", "sums", "turns"),
    "samples": ("gsm8k", "sums", "turns"),
}


def add_verbs(verb: Verbs, arguments: Sequence[str]) -> None:
    generate = verb("generate", generate_text)
    model_argument(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    add_keys(generate, SamplingOptions)
    generate.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts at which it ends, without them")
    generate.add_argument("--n", type=int, default=1, metavar="N", help="so many answers, of seeds SEED, SEED + 1, ..")
    forms = generate.add_mutually_exclusive_group()
    forms.add_argument("--choices", nargs="+", metavar="TEXT", help="the answer is one of these texts")
    forms.add_argument("--regex", metavar="PATTERN", help="the answer matches this regular expression, whole")
    forms.add_argument("--json-schema", type=Path, metavar="FILE", help="the answer is JSON, valid by this schema")
    generate.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    quantize_flag(generate)
    chat = verb("chat", chat_with)
    model_argument(chat)
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    add_keys(chat, SamplingOptions)
    chat.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    quantize_flag(chat)
    serve = verb("serve", serve_models)
    serve.add_argument("models", nargs="+", metavar="MODEL", help="run, checkpoint, model folder or Hub id")
    add_keys(serve, ServeOptions)
    evaluate = verb("eval", evaluate_model)
    model_argument(evaluate)
    evaluate.add_argument("--tasks", default="bpb", help="comma-separated: bpb, gsm8k, sums, turns, probes")
    evaluate.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="bpb: a token set or text (default: the run's own held-out part); gsm8k: its test file; probes: a file "
        "with one question a line",
    )
    evaluate.add_argument(
        "--baselines", action="store_true", help="with bpb: uniform, unigram, bigram and xz on the same text beside it"
    )
    evaluate.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="bpb: whole documents of at most so many tokens (default: 1,000,000); gsm8k, sums: so many questions",
    )
    evaluate.add_argument("--before", metavar="MODEL", help="probes: another model's answers beside these")
    evaluate.add_argument("--page", type=Path, metavar="FILE", help="probes: the answers side by side as HTML")
    evaluate.add_argument("--tokens", type=int, metavar="N", help="tokens of an answer at most")
    evaluate.add_argument("--samples", type=int, default=0, metavar="K", help="gsm8k, sums: K sampled answers too")
    evaluate.add_argument("--shots", type=int, metavar="N", help="examples in the prompt")
    quantize_flag(evaluate)
    json_flag(evaluate)


def quantize_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize", default="none", choices=("none", "int8"), help="int8 = weights in int8, on a CPU (default: none)"
    )


def generate_text(options: argparse.Namespace) -> None:
    layout.check_model_name(options.model)  # before torch is loaded
    sampling, shaping, form = chosen(SamplingOptions, options), Shaping(stop=tuple(options.stop)), _form(options)
    if options.n < 1 or (options.n > 1 and sampling.temperature == 0):
        raise InputError(f"--n: found {options.n}, expected 1 or more, and 1 with --temperature 0: all would be one")
    from argonne.serve.engine import open_engine

    engine = open_engine(options.model, device=options.device, int8=options.quantize == "int8")
    shown = -1
    for number, piece in engine.streams(
        options.prompt, [sampling.with_seed(n) for n in range(options.n)], shaping, form
    ):
        if number > shown:  # not before the first piece: a message about the prompt comes before it
            print("\n" * (shown >= 0), end="", flush=True)
            if options.n > 1:
                print(f"--- {number + 1} of {options.n}, seed {sampling.seed + number}", file=sys.stderr, flush=True)
            print(options.prompt, end="")
            shown = number
        print(piece, end="", flush=True)
    print()


def _form(options: argparse.Namespace) -> dict[str, object] | None:
    """What the answer must be, as argonne.serve.structured takes it."""
    if options.choices:
        return {"type": "choice", "choices": options.choices}
    if options.regex is not None:
        return {"type": "regex", "pattern": options.regex}
    if options.json_schema is None:
        return None
    try:
        return {"type": "json_schema", "schema": json.loads(options.json_schema.read_bytes())}
    except (OSError, ValueError) as error:
        raise InputError(f"--json-schema {options.json_schema}: no JSON could be read ({first_line(error)})") from None


def chat_with(options: argparse.Namespace) -> None:
    layout.check_model_name(options.model)  # before torch is loaded
    sampling = chosen(SamplingOptions, options)
    from argonne.serve.chat import DIM, TAGS, Chat, Terminal, remember_lines
    from argonne.serve.engine import open_engine

    engine = open_engine(options.model, device=options.device, int8=options.quantize == "int8")
    watched = sys.stdin.isatty() and sys.stdout.isatty()
    terminal = Terminal(
        Chat(engine, sampling, options.system), partial(print, end="", flush=True), DIM if watched else TAGS
    )
    if watched:
        remember_lines(terminal.write)
    terminal.talk(input)


def serve_models(options: argparse.Namespace) -> None:
    for name in options.models:
        layout.check_model_name(name)  # before torch is loaded
    how = chosen(ServeOptions, options)
    from argonne.serve.server import serve

    serve(options.models, how)


def evaluate_model(options: argparse.Namespace) -> None:
    tasks = options.tasks.split(",")
    for flag, needed in NEEDS.items():
        if getattr(options, flag) and not {*needed} & {*tasks}:
            raise InputError(
                f"--{flag}: is for --tasks {' or '.join(needed)}, found --tasks {options.tasks}; add one, or leave "
                "it out"
            )
    if options.data and len(readers := [name for name in tasks if name in NEEDS["data"]]) > 1:
        raise InputError(
            f"--data: {' and '.join(readers)} read different things; measure them in commands of their own"
        )
    models = [options.before, options.model] if options.before else [options.model]
    for name in models:
        layout.check_model_name(name)  # before torch is loaded
    from argonne.evaluate.run import evaluate, render

    results = []
    for number, name in enumerate(models, 1):
        asked = tasks if number == len(models) else ["probes"]
        with progress_bar("requests") as progress:
            how = {"tokens": options.tokens, "samples": options.samples, "progress": progress}
            how["int8"] = options.quantize == "int8"
            results.append(evaluate(name, asked, options.data, options.shots, limit=options.limit, **how))
    found = {**results[-1], "before": results[0]} if options.before else results[0]
    others = _baselines(found, options.limit) if options.baselines else None
    text = "\n".join(map(render, results))
    if others:
        beside = ", ".join(f"{name} {others[name]:.4f}" for name in ("uniform", "unigram", "bigram", "xz"))
        text += f"\n    beside it: {beside} bits per byte on the same text"
    if "probes" in tasks:
        text += "\n\n" + _answers(results, options.page)
    show({**found, "baselines": others} if others else found, text, as_json=options.json)


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
