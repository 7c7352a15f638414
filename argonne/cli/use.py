"""generate, chat, serve, eval: use and measure a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.cli.command import Verbs, add_keys, chosen, json_flag, model_argument, progress_bar, show
from argonne.errors import InputError
from argonne.serve.options import SamplingOptions, ServeOptions

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
    generate.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    chat = verb("chat", chat_with)
    model_argument(chat)
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    add_keys(chat, SamplingOptions)
    chat.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
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
    json_flag(evaluate)


def generate_text(options: argparse.Namespace) -> None:
    layout.check_model_name(options.model)  # before torch is loaded
    from argonne.serve.engine import generate_text

    pieces = generate_text(options.model, options.prompt, chosen(SamplingOptions, options), device=options.device)
    first = next(pieces, "")  # loads the model: a message about it comes before the text
    print(options.prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def chat_with(options: argparse.Namespace) -> None:
    layout.check_model_name(options.model)  # before torch is loaded
    sampling = chosen(SamplingOptions, options)
    from argonne.serve.chat import Chat, talk
    from argonne.serve.engine import open_engine

    chat = Chat(open_engine(options.model, device=options.device), sampling, options.system)
    talk(chat, input, lambda text: print(text, end="", flush=True))


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
