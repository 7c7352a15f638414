"""Every flag of `argonne prepare`, and which of them decide the bytes."""

from __future__ import annotations

import difflib
from argparse import ArgumentTypeError
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from argonne.declare import key
from argonne.errors import InputError
from argonne.jobs import JobSettings, directives

FILTERS = ("quality",)
CONTAMINATION_RULE = 2  # 1: texts of 13 words or more alone
TEXT = "text: parquet, arrow, jsonl, txt; the last two also .gz, .bz2, .xz, .zst"
SPLITS = ("file", "blank-lines", "lines")
COLUMN = "column or field that holds the text"
SPLIT = "txt: file (one document), blank-lines, lines, or a separator"


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ArgumentTypeError(f"found {text!r}, expected K/N with 1 <= K <= N")
    return int(number), int(count)


@dataclass(frozen=True)
class TokenizerOptions:
    """Every flag of `argonne tokenizer train`."""

    input: tuple[str, ...] = key(MISSING, TEXT, metavar="GLOB")
    vocab_size: int = key(MISSING, "entries, reserved tokens included", metavar="N")
    out: Path = key(MISSING, "folder to write", metavar="DIR")
    bare: bool = key(False, "only the five special tokens of the 1.x tokenizer")
    text_column: str = key("text", COLUMN, metavar="NAME")
    split: str = key("file", SPLIT, metavar="HOW")


@dataclass(frozen=True)
class PrepareOptions:
    """Every flag of `argonne prepare`."""

    input: tuple[str, ...] = key(MISSING, TEXT, metavar="GLOB")
    out: Path = key(MISSING, "folder to write", metavar="DIR")
    tokenizer: Path | None = key(None, "folder of the tokenizer", metavar="DIR")
    train_tokenizer: int | None = key(None, "train a tokenizer of N entries on the input first", metavar="N")
    bare: bool = key(False, "with --train-tokenizer: only the five special tokens of 1.x")
    text_column: str = key("text", COLUMN, metavar="NAME")
    split: str = key("file", SPLIT, metavar="HOW")
    filter: tuple[str, ...] = key((), "quality filters to apply (quality)", metavar="NAME")
    dedup: bool = key(False, "drop exact duplicates, counted")
    decontaminate: tuple[str, ...] = key((), "drop documents that hold text of these files", metavar="FILE")
    hold_out: float = key(0.0, "share of the documents that is never trained on", metavar="F")
    bos: bool = key(False, "begin each document with the tokenizer's BOS")
    added_tokens: str = key("library", "plain: added tokens in text are plain text", ("library", "plain"))
    format: str = key("shards", "shards, or one train.bin as the family's", ("shards", "train.bin"))
    workers: int = key(0, "processes; 0 = one a core", metavar="N")
    engine: str = key("local", "who runs the workers", ("local", "slurm", "ray"))
    part: tuple[int, int] | None = key(
        None, "encode only part K of N (1-based); the last to finish completes the set", metavar="K/N", parse=_part
    )
    encoder: str = key("auto", "reference encoder, or the fast one", ("auto", "tokenizers", "gigatoken"))
    skip_bad_shards: bool = key(False, "count and pass over files that cannot be read")
    max_drop_fraction: float = key(0.1, "abort when more rows than this are dropped", metavar="F")
    jobs: JobSettings = key(JobSettings(), "settings of SLURM's jobs")

    def recipe(self) -> dict[str, Any]:
        """The options that decide which bytes are written."""
        names = ("text_column", "split", "dedup", "hold_out", "bos", "added_tokens", "format", "skip_bad_shards")
        return {
            **{name: getattr(self, name) for name in names},
            "input": list(self.input),
            "filter": sorted(self.filter),
            "decontaminate": list(self.decontaminate),
            **({"decontaminate_rule": CONTAMINATION_RULE} if self.decontaminate else {}),
        }


def check_options(options: PrepareOptions) -> None:
    """Raise InputError for a value out of range or for flags that contradict one another."""
    if (options.tokenizer is None) == (options.train_tokenizer is None):
        raise InputError("prepare needs exactly one of --tokenizer FOLDER and --train-tokenizer VOCABULARY")
    if not 0.0 <= options.hold_out < 1.0:
        raise InputError(f"--hold-out: found {options.hold_out}, expected a share from 0 to below 1")
    if not 0.0 <= options.max_drop_fraction <= 1.0:
        raise InputError(f"--max-drop-fraction: found {options.max_drop_fraction}, expected a share from 0 to 1")
    if unknown := set(options.filter) - set(FILTERS):
        raise InputError(f"--filter: found {', '.join(sorted(unknown))}, expected {', '.join(FILTERS)}")
    for field in fields(options):
        choices, found = field.metadata["choices"], getattr(options, field.name)
        if choices and found not in choices:
            expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise InputError(f"--{field.name.replace('_', '-')}: found {found!r}, expected {expected}")
    for item in fields(options.jobs) if options.engine != "slurm" else ():
        if found := getattr(options.jobs, item.name):
            raise InputError(
                f"--{item.name}: found {found!r}, but it acts only with --engine slurm; remove it, or set that"
            )
    directives("slurm", options.jobs)
    if options.workers < 0:
        raise InputError(f"--workers: found {options.workers}, expected 0 (one a core) or more")
    check_split(options.split)
    if options.part is not None and not 1 <= options.part[0] <= options.part[1]:
        raise InputError(f"--part: found {options.part[0]}/{options.part[1]}, expected K/N with K from 1 to N")


def check_split(split: str) -> None:
    """Raise InputError for no separator, and for one that looks like a misspelt way to split."""
    if not split:
        raise InputError("--split: empty, expected file, lines, blank-lines or a separator")
    alike = difflib.get_close_matches(split.strip().lower().replace("_", "-"), SPLITS, n=1, cutoff=0.7)
    if alike and split not in SPLITS:
        raise InputError(
            f"--split: found {split!r}, did you mean {alike[0]!r}? Expected {', '.join(SPLITS)}, or a separator that "
            "looks like none of them"
        )
