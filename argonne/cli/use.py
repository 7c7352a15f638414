"""generate, eval: use and measure a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.cli.command import Verbs, add_keys, chosen, json_flag, model_argument, progress_bar, show
from argonne.errors import InputError
from argonne.serve.options import SamplingOptions


def add_verbs(verb: Verbs, arguments: Sequence[str]) -> None:
    generate = verb("generate", generate_text)
    model_argument(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    add_keys(generate, SamplingOptions)
    generate.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    evaluate = verb("eval", evaluate_model)
    model_argument(evaluate)
    evaluate.add_argument("--tasks", default="bpb", help="comma-separated: bpb")
    evaluate.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="token set or text the tasks read (default: the run's own held-out part)",
    )
    evaluate.add_argument(
        "--baselines", action="store_true", help="with bpb: uniform, unigram, bigram and xz on the same text beside it"
    )
    evaluate.add_argument(
        "--limit",
        type=int,
        metavar="TOKENS",
        help="bpb: whole documents of at most so many tokens (default: 1,000,000)",
    )
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


def evaluate_model(options: argparse.Namespace) -> None:
    layout.check_model_name(options.model)  # before torch is loaded
    from argonne.evaluate.run import evaluate, render

    with progress_bar("requests") as progress:
        found = evaluate(
            options.model, options.tasks.split(","), options.data, options.shots, limit=options.limit, progress=progress
        )
    others = _baselines(found, options.limit) if options.baselines else None
    text = render(found)
    if others:
        beside = ", ".join(f"{name} {others[name]:.4f}" for name in ("uniform", "unigram", "bigram", "xz"))
        text += f"\n    beside it: {beside} bits per byte on the same text"
    show({**found, "baselines": others} if others else found, text, as_json=options.json)


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
