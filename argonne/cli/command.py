"""`argonne VERB ...`: find the verb's page, parse, call its function, turn what it raises into one line and an exit
code.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import itertools
import re
import shutil
import signal
import sys
import textwrap
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from argonne import __version__
from argonne.errors import REQUESTS, Ended, InputError, first_line, outlive_stderr

# The way from text to a model that others use: page of the verbs, what they are for, each verb and what it does.
PAGES = (
    ("begin", "begin here", {
        "train": "a model from a folder of text, in one command: prepare, pick a size, train, report",
        "demo": "every stage at laptop size in minutes, ending with a report and a model to try",
        "models": "list the model presets with their exact parameter counts",
        "plan": "what a run will take, before it starts: memory, hours, cost",
    }),
    ("data", "from text to tokens", {
        "tokenizer": "train a byte-level BPE tokenizer on text",
        "prepare": "turn text into token shards with a manifest",
    }),
    ("train", "from tokens to a model", {
        "pretrain": "train from fresh weights, or from given ones",
        "continue": "pretrain further from given weights, with a schedule of its own",
        "midtrain": "train given weights on longer rows, with another RoPE base",
        "sft": "fine-tune on conversations: a base model becomes a chat model",
        "cot-sft": "fine-tune on answers that think first",
        "dpo": "tune on pairs of a better and a worse answer",
    }),
    ("launch", "on a cluster", {
        "rehearse": "a chain of recipes, small and on this CPU, before a GPU is booked: train, stop, resume, export",
        "launch": "hand in jobs that go on from one another until their runs are complete, to SLURM or PBS",
    }),
    ("watch", "look at what there is", {
        "runs": "what is running, stopped, failed and complete",
        "report": "one self-contained HTML page with plots, of one run or several compared",
        "inspect": "say what an artifact is, verify its hashes, show its lineage",
    }),
    ("use", "use a model", {
        "generate": "continue a prompt",
        "chat": "talk to a chat model in the terminal",
        "serve": "answer programs over HTTP, by the APIs of OpenAI and Anthropic",
    }),
    ("measure", "measure a model", {
        "eval": "measure a model, with counts and standard errors",
        "compare": "models on the same items, in pairs: what differs, and what the items could show",
    }),
    ("move", "hand it on", {
        "import": "turn an earlier checkpoint of the family into a complete model folder",
        "merge": "average the weights of models of one shape",
        "export": "write a model for other people's tools, proven by its logits before it is put in place",
        "publish": "check an export in every way a reader uses it, and push it to the Hub in one commit",
    }),
)  # fmt: skip
ALL_VERBS = {verb: text for _, _, verbs in PAGES for verb, text in verbs.items()}
RECIPE_VERBS = ("train", "pretrain", "continue", "midtrain", "sft", "cot-sft", "dpo", "launch", "rehearse", "plan")
Verbs = Callable[..., "Parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done, 2 wrong input, 3 stopped on request and resumable, 1 anything else."""
    if argv is not None:
        return run_verb(argv)
    outlive_stderr()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know the letters of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    code = run_verb(argv)
    for number in REQUESTS:  # the process ends: a request that comes now is too late to change how
        signal.signal(number, signal.SIG_IGN)
    return code


def run_verb(argv: Sequence[str] | None) -> int:
    started = time.monotonic()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        for text in arguments:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(
                    f"{text!r}: is not UTF-8, and no file of a run could hold it; rename the file or folder"
                )
        if arguments[:1] == ["completion"]:
            return print_completion(arguments[1:])
        mark = (
            arguments.index("--")
            if arguments[:1] in (["launch"], ["rehearse"]) and "--" in arguments
            else len(arguments)
        )
        options, rest = build_parser(arguments).parse_known_args(arguments[:mark])
        options.started, options.rest = started, rest + arguments[mark + 1 :]
        if rest and options.verb not in RECIPE_VERBS:
            said = options.parser.not_known(rest[0]) if rest[0].startswith("-") else f"unknown argument {rest[0]!r}"
            raise InputError(f"{options.verb}: {said}; see `argonne {options.verb} --help`")
        return int(options.function(options) or 0)
    except Ended as error:
        print(f"argonne: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("argonne: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:  # whatever is left: a person sees one line, and who looks for the cause finds it
        print(f"argonne: {type(error).__name__}: {first_line(error)}{saved_traceback()}", file=sys.stderr)
        return 1


def saved_traceback() -> str:
    """Where the traceback of the exception at hand was written, as the end of a message."""
    import tempfile  # both only here, since `argonne --help` is to answer at once
    import traceback

    try:
        handle, name = tempfile.mkstemp(prefix="argonne-", suffix="-traceback.txt")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(traceback.format_exc())
    except OSError as problem:
        return f" (its traceback could not be saved: {problem})"
    return f" (traceback: {name})"


def print_completion(arguments: Sequence[str]) -> int:
    """`argonne completion SHELL`: the script that completes verbs, flags, recipe keys and packaged recipes."""
    import shtab

    from argonne.keys import all_keys
    from argonne.recipe import recipe_names

    if len(arguments) != 1 or arguments[0] not in shtab.SUPPORTED_SHELLS:
        raise InputError(
            f"completion: found {' '.join(arguments) or 'nothing'!r}, expected one of "
            f"{', '.join(shtab.SUPPORTED_SHELLS)}"
        )
    parser = build_parser((), whole=True)
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name in RECIPE_VERBS:
        verb = verbs.choices[name]
        for path, item in all_keys().items():
            verb.add_argument(f"--{path}", help=item.metadata["meaning"], choices=item.metadata["choices"] or None)
        for action in verb._actions:
            if action.dest in ("recipe", "recipes"):
                action.choices = recipe_names()
    print(shtab.complete(parser, shell=arguments[0]))
    return 0


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, False, argparse.SUPPRESS, [], ()) and "default" not in (action.help or "")
        return f"{action.help or ''} (default: %(default)s)" if shown and action.option_strings else action.help or ""


class Parser(argparse.ArgumentParser):
    """Wrong arguments are an InputError like all wrong input: one line that names what was found and where help is."""

    given: Sequence[str] = ()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in (ALL_VERBS if action.dest == "verb" else action.choices)]
            alike = difflib.get_close_matches(str(value), known, n=1)
            name = "/".join(action.option_strings) or action.metavar or action.dest
            hint = f"did you mean {alike[0]!r}? " if alike else ""
            self.error(f"{name}: found {value!r}, expected one of {', '.join(map(repr, known))}; {hint}".rstrip("; "))

    def error(self, message: str) -> NoReturn:
        verb = self.prog.removeprefix("argonne").strip()
        flags = [] if verb in RECIPE_VERBS else [item.partition("=")[0] for item in self.given if item.startswith("--")]
        hint = next((f"; {self.not_known(flag)}" for flag in flags if flag not in self._option_string_actions), "")
        raise InputError(f"{f'{verb}: ' if verb else ''}{message}{hint}; see `{self.prog} --help`")

    def not_known(self, flag: str) -> str:
        alike = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"{flag!r} is not known{f', did you mean {alike[0]!r}?' if alike else ''}"


def build_parser(arguments: Sequence[str], *, whole: bool = False) -> argparse.ArgumentParser:
    """The parser of the verb that `arguments` begin with; of every verb where `whole`; else one that names them all, so
    that `argonne --help` answers at once.
    """
    asked = arguments[0] if arguments and arguments[0] in ALL_VERBS and not whole else None
    parser = Parser(
        prog="argonne",
        description="From raw text to a published chat model: every stage, each resumable exactly.",
        epilog=None
        if asked
        else "the way:\n" + "\n".join(f"  {meaning:24} {', '.join(verbs)}" for _, meaning, verbs in PAGES),
        allow_abbrev=False,
        formatter_class=Formatter,
    )
    parser.add_argument("--version", action="version", version=f"argonne {__version__}")
    parsers: Any = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    parser.given = arguments

    def verb(name: str, function: Callable[[argparse.Namespace], int | None], **more: Any) -> Parser:
        text = ALL_VERBS[name]
        more |= {"allow_abbrev": False, "formatter_class": Formatter}
        made: Parser = parsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", **more)
        made.set_defaults(function=function, parser=made)
        made.given = arguments
        return made

    for page, _, verbs in PAGES:
        for name in () if asked or whole else verbs:
            parsers.add_parser(name, help=verbs[name])
        if whole or asked in verbs:
            importlib.import_module(f"argonne.cli.{page}").add_verbs(verb, arguments)
    return parser


def add_keys(parser: Parser, kind: type) -> None:
    """A flag for every field of a dataclass of options, those of its parts included: name, type, default, meaning and
    choices stand in the field.
    """
    import dataclasses  # as below: `argonne --help` needs neither, and is to answer at once

    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint, meaning = hints[item.name], item.metadata["meaning"]
        if dataclasses.is_dataclass(hint):
            add_keys(parser, typing.cast(type, hint))
            continue
        required = item.default is dataclasses.MISSING
        more: dict[str, Any] = {"help": meaning, "required": required, "dest": item.name}
        if not required:
            more["default"] = item.default
        if hint is bool:
            more |= {"action": "store_true"}
        elif hint == tuple[str, ...]:
            more |= {"nargs": "+", "action": "extend", "metavar": item.metadata["metavar"], "default": []}
        else:
            kinds = [part for part in typing.get_args(hint) if part is not type(None)] or [hint]
            more |= {
                "type": item.metadata["parse"] or kinds[0],
                "metavar": item.metadata["metavar"] or {int: "N", float: "F"}.get(kinds[0]),
                "choices": item.metadata["choices"] or None,
            }
        parser.add_argument(f"--{item.name.replace('_', '-')}", **more)


def chosen(kind: type, options: argparse.Namespace) -> Any:
    """The dataclass of options that the flags of `add_keys` say."""
    import dataclasses

    hints = typing.get_type_hints(kind)
    values = {
        name: chosen(typing.cast(type, hint), options) if dataclasses.is_dataclass(hint) else getattr(options, name)
        for name, hint in hints.items()
    }
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def quantize_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize", default="none", choices=("none", "int8"), help="int8 = weights in int8, on a CPU (default: none)"
    )


def json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document to stdout; everything for people goes to stderr"
    )


def model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run, checkpoint, model folder or Hub id")


def recipe_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", help="packaged name or TOML file; each of its keys is also --section.key VALUE"
    )


def out_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")


def show(found: Any, text: str | None = None, *, as_json: bool) -> None:
    """A result to stdout: one JSON document, or its text for people (facts without one: a line each)."""
    if as_json:
        from argonne.files import json_text

        text = json_text(found, indent=2, ascii_only=str(getattr(sys.stdout, "encoding", "")).lower() != "utf-8")
    text = "\n".join(f"{name}: {value}" for name, value in found.items()) if text is None else text
    if sys.stdout.isatty() and not as_json:
        columns = shutil.get_terminal_size().columns
        text = "\n".join(folded(line, columns) for line in text.split("\n"))
    print(text)


def folded(line: str, columns: int) -> str:
    """A line of at most so many columns, or cut between words; what goes on stands under the text behind its label."""
    if len(line) <= columns:
        return line
    label = re.match(r"\s*\S+(?: \S+)*?(?:  +|: )", line)
    indent = len(label[0]) if label and label.end() <= columns // 2 else len(line) - len(line.lstrip()) + 2
    return textwrap.fill(line, columns, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


SECONDS_A_LINE = 10.0


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on a terminal, elsewhere a line now and then; called with (done, total)."""
    from tqdm import tqdm

    lines, first = not sys.stderr.isatty(), -1
    began = told = 0.0
    with tqdm(unit=unit, file=sys.stderr, disable=lines, leave=False, dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            nonlocal began, told, first
            bar.total = total
            bar.update(done - bar.n)
            now = time.monotonic()
            if first < 0:
                first, began, told = done, now, now
            elif lines and now >= told + SECONDS_A_LINE:
                rate, told = (done - first) / (now - began), now
                left = f", {(total - done) / rate:,.0f} s left" if rate else ""
                print(f"{unit}: {done:,} of {total:,}, {rate:,.1f}/s{left}", file=sys.stderr, flush=True)

        yield show


def parse_overrides(rest: Sequence[str]) -> dict[str, Any]:
    """`--section.key VALUE` and `--section.key=VALUE` as a dict; `--data.sources PATH[:WEIGHT] ..` too. Raises
    InputError for anything else.
    """
    found: dict[str, Any] = {}
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
        if name == "data.sources" and not value.lstrip().startswith(("[", "{")):
            more = [items.pop(0) for _ in itertools.takewhile(lambda item: not item.startswith("--"), list(items))]
            found[name] = [_source(text) for text in (value, *more)]
    return found


def _source(text: str) -> dict[str, Any]:
    """`tokens/a:0.7` as a table of `data.sources`; what is no number behind the colon belongs to the path."""
    path, _, weight = text.rpartition(":")
    try:
        return {"path": path, "weight": float(weight)} if path else {"path": text}
    except ValueError:
        return {"path": text}
