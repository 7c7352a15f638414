"""Every flag of `argonne prepare`, and which of them decide the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.errors import InputError

FILTERS = ("quality",)


@dataclass(frozen=True)
class PrepareOptions:
    """Every flag of `argonne prepare`."""

    input: tuple[str, ...]
    out: Path
    tokenizer: Path | None = None
    train_tokenizer: int | None = None
    bare: bool = False
    text_column: str = "text"
    split: str = "file"
    filter: tuple[str, ...] = ()
    dedup: bool = False
    decontaminate: tuple[str, ...] = ()
    hold_out: float = 0.0
    bos: bool = False
    added_tokens: str = "library"
    format: str = "shards"
    workers: int = 0
    engine: str = "local"
    part: tuple[int, int] | None = None
    encoder: str = "auto"
    skip_bad_shards: bool = False
    max_drop_fraction: float = 0.1

    def recipe(self) -> dict[str, Any]:
        """The options that decide which bytes are written."""
        names = ("text_column", "split", "dedup", "hold_out", "bos", "added_tokens", "format", "skip_bad_shards")
        return {
            **{name: getattr(self, name) for name in names},
            "input": list(self.input),
            "filter": sorted(self.filter),
            "decontaminate": list(self.decontaminate),
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
    if options.format not in ("shards", "train.bin"):
        raise InputError(f"--format: found {options.format!r}, expected shards or train.bin")
    if options.encoder not in ("auto", "tokenizers", "gigatoken"):
        raise InputError(f"--encoder: found {options.encoder!r}, expected auto, tokenizers or gigatoken")
    if options.workers < 0:
        raise InputError(f"--workers: found {options.workers}, expected 0 (one a core) or more")
    if not options.split:
        raise InputError("--split: empty, expected file, lines, blank-lines or a separator")
    if options.part is not None and not 1 <= options.part[0] <= options.part[1]:
        raise InputError(f"--part: found {options.part[0]}/{options.part[1]}, expected K/N with K from 1 to N")
