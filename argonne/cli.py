"""The command line: parse, build a config, call one function. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from argonne import __version__, actions
from argonne.errors import InputError, Stopped

TRAINING_VERBS = {
    "pretrain": "train from fresh weights, or from given ones",
    "continue": "pretrain further from given weights, with a schedule of its own",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done, 2 wrong input, 3 stopped on request and resumable, 1 anything else."""
    started = time.monotonic()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser(arguments)
        options, rest = parser.parse_known_args(arguments)
        options.started, options.rest = started, rest
        if rest and options.verb not in (*TRAINING_VERBS, "plan"):
            raise InputError(f"{options.verb}: unknown argument {rest[0]!r}; see `argonne {options.verb} --help`")
        return int(options.function(options) or 0)
    except (InputError, Stopped) as error:
        print(f"argonne: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("argonne: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 1


class Parser(argparse.ArgumentParser):
    """Wrong arguments are an InputError like all wrong input: one line that names what was found and where help is."""

    given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        import difflib
        import re

        hint, verb = "", self.prog.removeprefix("argonne").strip()
        if choice := re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message):
            near = difflib.get_close_matches(choice[2], re.findall(r"[\w.-]+", choice[3]), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            message = f"{choice[1]}: found {choice[2]!r}, expected one of {choice[3]}"
        elif "required" in message and verb not in TRAINING_VERBS:
            flags = [item.partition("=")[0] for item in self.given if item.startswith("--")]
            if unknown := [flag for flag in flags if flag not in self._option_string_actions]:
                near = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
                hint = f"{unknown[0]!r} is not known{f', did you mean {near[0]!r}?' if near else ';'} "
        raise InputError(f"{f'{verb}: ' if verb else ''}{message}; {hint}see `{self.prog} --help`")


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(
        prog="argonne", description="From raw text to a published chat model: every stage, each resumable exactly.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"argonne {__version__}")
    verbs: Any = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    parser.given = verbs.given = arguments
    _add_first_steps(verbs)
    _add_data(verbs)
    _add_plan(verbs)
    _add_training(verbs, arguments)
    _add_use(verbs)
    _add_runs(verbs)
    _add_moving(verbs)
    return parser


def _verb(verbs: Any, name: str, text: str, function: Any, **more: Any) -> Parser:
    parser: Parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False, **more)
    parser.set_defaults(function=function)
    parser.given = verbs.given
    return parser


def _json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document to stdout; everything for people goes to stderr")


def _add_first_steps(verbs: Any) -> None:
    demo = _verb(verbs, "demo", "every stage at laptop size in minutes, ending with a report and a model to try", actions.show_demo)
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything it makes (default: demo)")
    models = _verb(verbs, "models", "list the model presets with their exact parameter counts", actions.list_models)
    _json_flag(models)


def _add_data(verbs: Any) -> None:
    tokenizer = _verb(verbs, "tokenizer", "train a tokenizer", lambda options: None)
    parts: Any = tokenizer.add_subparsers(dest="action", required=True, metavar="train")
    parts.given = verbs.given
    train = _verb(parts, "train", "train a byte-level BPE tokenizer on text", actions.train_tokenizer)
    train.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="GLOB", help="text: parquet, arrow, jsonl(.gz|.zst), txt"
    )
    train.add_argument("--vocab-size", type=int, required=True, help="entries, reserved tokens included")
    train.add_argument("--out", type=Path, required=True, help="folder to write")
    train.add_argument("--bare", action="store_true", help="only the five special tokens of the 1.x tokenizer")
    train.add_argument("--text-column", default="text", help="column or field that holds the text (default: text)")
    train.add_argument("--split", default="file", metavar="HOW", help="txt: file (one document), blank-lines, lines, or a separator")
    prepare = _verb(verbs, "prepare", "turn text into token shards with a manifest", actions.prepare_tokens)
    prepare.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="GLOB", help="text: parquet, arrow, jsonl(.gz|.zst), txt"
    )
    which = prepare.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of the tokenizer")
    which.add_argument("--train-tokenizer", type=int, metavar="N", help="train a tokenizer of N entries on the input first")
    prepare.add_argument("--out", type=Path, required=True, help="folder to write")
    prepare.add_argument("--text-column", default="text", help="column or field that holds the text (default: text)")
    prepare.add_argument("--hold-out", type=float, default=0.0, metavar="F", help="share of the documents that is never trained on")
    prepare.add_argument("--workers", type=int, default=0, metavar="N", help="processes; 0 = one a core")
    _add_prepare_depth(prepare)
    inspect = _verb(verbs, "inspect", "say what an artifact is, verify its hashes, show its lineage", actions.inspect_artifact)
    inspect.add_argument("path", type=Path, metavar="PATH", help="token set, run, checkpoint or exported model")
    _json_flag(inspect)


def _add_prepare_depth(prepare: argparse.ArgumentParser) -> None:
    """The flags of `prepare` beyond the everyday ones; each is a field of PrepareOptions."""
    prepare.add_argument("--bare", action="store_true", help="with --train-tokenizer: only the five special tokens of 1.x")
    prepare.add_argument("--split", default="file", metavar="HOW", help="txt: file (one document), blank-lines, lines, or a separator")
    prepare.add_argument("--filter", nargs="+", action="extend", default=[], metavar="NAME", help="quality filters to apply (quality)")
    prepare.add_argument("--dedup", action="store_true", help="drop exact duplicates, counted")
    prepare.add_argument(
        "--decontaminate",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="drop documents that share 13-grams with these files",
    )
    prepare.add_argument("--bos", action="store_true", help="begin each document with the tokenizer's BOS")
    prepare.add_argument(
        "--added-tokens", default="library", choices=("library", "plain"), help="plain: added tokens in text are plain text"
    )
    prepare.add_argument("--format", default="shards", choices=("shards", "train.bin"), help="shards, or one train.bin as the family's")
    prepare.add_argument("--engine", default="local", choices=("local", "slurm", "ray"), help="who runs the workers")
    prepare.add_argument(
        "--part", type=_part, metavar="K/N", help="encode only part K of N (1-based); the last to finish completes the set"
    )
    prepare.add_argument(
        "--encoder", default="auto", choices=("auto", "tokenizers", "gigatoken"), help="reference encoder, or the fast one"
    )
    prepare.add_argument("--skip-bad-shards", action="store_true", help="count and pass over files that cannot be read")
    prepare.add_argument("--max-drop-fraction", type=float, default=0.1, metavar="F", help="abort when more rows than this are dropped")


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected K/N with 1 <= K <= N")
    return int(number), int(count)


def _add_training(verbs: Any, arguments: Sequence[str]) -> None:
    wants_keys = bool(arguments) and arguments[0] in TRAINING_VERBS and bool({"-h", "--help"} & set(arguments))
    for name, text in TRAINING_VERBS.items():
        epilog = _keys_help() if wants_keys else None
        parser = _verb(verbs, name, text, actions.train_model, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("recipe", metavar="RECIPE", help="packaged name or TOML file")
        parser.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/NAME); an existing run is resumed")
        parser.add_argument("--init-from", metavar="MODEL", help="weights to start from: run, checkpoint, model folder or Hub id")
        parser.add_argument(
            "--resume-from", type=Path, metavar="CHECKPOINT", help="start a new run from the whole state of a checkpoint, or of a .pt"
        )
        parser.add_argument(
            "--data-from-start",
            action="store_true",
            help="with a .pt: begin the data at its start, where its position cannot be carried over",
        )
        parser.add_argument(
            "--allow", nargs="+", action="extend", default=[], metavar="KEY", help="keys that may differ from the run's on resume"
        )
        parser.add_argument("--wall-time", metavar="T", help="stop and save after this long: 90m, 12h, 1-12:00:00")
        parser.add_argument("--deadline", metavar="T", help="stop and save before this moment")
        parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
        parser.add_argument("--profile", action="store_true", help="write a trace of a few steps into the run")


def _add_plan(verbs: Any) -> None:
    plan = _verb(verbs, "plan", "what a run will take, before it starts: memory, hours, cost", actions.plan_run)
    plan.add_argument("recipe", metavar="RECIPE", help="packaged name or TOML file; recipe keys as --section.key VALUE")
    plan.add_argument("--gpu", metavar="NAME", help="device, as h200 (default: cpu for small models, h200 otherwise)")
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="devices (default: 1)")
    plan.add_argument("--price", type=float, metavar="P", help="price of a device for an hour")
    _json_flag(plan)


def _keys_help() -> str:
    from argonne.recipe import all_keys, recipe_names

    lines = ["recipe keys, each also --section.key VALUE:"]
    for path, item in all_keys().items():
        choices = ", ".join(item.metadata.get("choices") or ())
        lines.append(f"  --{path:36} {item.metadata['meaning']}{f' ({choices})' if choices else ''}")
    return "\n".join([*lines, "", "packaged recipes: " + ", ".join(recipe_names())])


def _add_use(verbs: Any) -> None:
    generate = _verb(verbs, "generate", "continue a prompt", actions.generate_text)
    generate.add_argument("model", metavar="MODEL", help="run, checkpoint, model folder or Hub id")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=int, default=200, help="tokens at most (default: 200)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 = greedy (default: 0.8)")
    generate.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest; 0 = all")
    generate.add_argument("--top-p", type=float, default=0.95, help="sample from the likeliest that make up p (default: 0.95)")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    evaluate = _verb(verbs, "eval", "measure a model, with counts and standard errors", actions.evaluate_model)
    evaluate.add_argument("model", metavar="MODEL", help="run, checkpoint, model folder or Hub id")
    evaluate.add_argument("--tasks", default="bpb", help="comma-separated: bpb")
    evaluate.add_argument(
        "--data", type=Path, metavar="DIR", help="token set or text the tasks read (default: the run's own held-out part)"
    )
    evaluate.add_argument("--baselines", action="store_true", help="with bpb: uniform, unigram, bigram and xz on the same text beside it")
    evaluate.add_argument("--limit", type=int, metavar="TOKENS", help="bpb: whole documents of at most so many tokens (default: 1,000,000)")
    evaluate.add_argument("--shots", type=int, metavar="N", help="examples in the prompt")
    _json_flag(evaluate)


def _add_runs(verbs: Any) -> None:
    runs = _verb(verbs, "runs", "what is running, stopped, failed and complete", actions.list_all)
    runs.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs (default: runs)")
    _json_flag(runs)
    report = _verb(verbs, "report", "one self-contained HTML page with plots, of one run or several compared", actions.write_page)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run")


def _add_moving(verbs: Any) -> None:
    imports = _verb(verbs, "import", "turn an earlier checkpoint of the family into a complete model folder", actions.import_earlier)
    imports.add_argument("path", type=Path, metavar="PATH", help="model folder or .pt training checkpoint in an earlier format")
    imports.add_argument("--out", type=Path, required=True, metavar="DIR")
    imports.add_argument(
        "--attention", default="full", choices=("full", "as-config"), help="full: as the released weights were trained (default)"
    )
    _json_flag(imports)
    export = _verb(
        verbs, "export", "write a model for other people's tools, proven by its logits before it is put in place", actions.export_model
    )
    export.add_argument("model", metavar="MODEL", help="run, checkpoint, model folder or Hub id")
    export.add_argument("--as", dest="kind", required=True, choices=("hf", "native", "pt"), help="custom class, a stock class, or .pt")
    export.add_argument("--out", type=Path, required=True, metavar="DIR")
    _json_flag(export)


if __name__ == "__main__":
    sys.exit(main())
