"""generate, chat, serve, eval: use and measure a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from argonne import layout
from argonne.cli.command import Verbs, add_keys, chosen, model_argument, quantize_flag
from argonne.errors import InputError, first_line
from argonne.serve.options import SamplingOptions, ServeOptions, Shaping


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


def generate_text(options: argparse.Namespace) -> None:
    layout.check_model_name(options.model)  # before torch is loaded
    sampling, shaping, form = chosen(SamplingOptions, options), Shaping(stop=tuple(options.stop)), _form(options)
    if options.n < 1 or (options.n > 1 and sampling.temperature == 0):
        raise InputError(f"--n: found {options.n}, expected 1 or more, and 1 with --temperature 0: all would be one")
    from argonne.parallel.neighbours import beside_others
    from argonne.serve.engine import open_engine

    engine = open_engine(options.model, device=options.device, int8=options.quantize == "int8")
    shown, seeds = -1, [sampling.with_seed(n) for n in range(options.n)]
    with beside_others():
        for number, piece in engine.streams(options.prompt, seeds, shaping, form):
            if number > shown:  # not before the first piece: a message about the prompt comes before it
                print("\n" * (shown >= 0), end="", flush=True)
                if options.n > 1:
                    print(
                        f"--- {number + 1} of {options.n}, seed {sampling.seed + number}", file=sys.stderr, flush=True
                    )
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
    from argonne.parallel.neighbours import beside_others
    from argonne.serve.chat import DIM, TAGS, Chat, Terminal, remember_lines
    from argonne.serve.engine import open_engine

    engine = open_engine(options.model, device=options.device, int8=options.quantize == "int8")
    watched = sys.stdin.isatty() and sys.stdout.isatty()
    terminal = Terminal(
        Chat(engine, sampling, options.system), partial(print, end="", flush=True), DIM if watched else TAGS
    )
    if watched:
        remember_lines(terminal.write)
    with beside_others():
        terminal.talk(input)


def serve_models(options: argparse.Namespace) -> None:
    for name in options.models:
        layout.check_model_name(name)  # before torch is loaded
    how = chosen(ServeOptions, options)
    from argonne.parallel.neighbours import beside_others
    from argonne.serve.server import serve

    with beside_others():
        serve(options.models, how)
