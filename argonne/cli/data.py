"""tokenizer, prepare: from text to tokens."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from argonne.cli.command import Verbs, add_keys, chosen
from argonne.prepare.options import PrepareOptions, TokenizerOptions


def add_verbs(verb: Verbs, arguments: Sequence[str]) -> None:
    tokenizer = verb("tokenizer", "train a tokenizer", train_tokenizer)
    parts: Any = tokenizer.add_subparsers(dest="action", required=True, metavar="train")
    add_keys(verb("train", "train a byte-level BPE tokenizer on text", train_tokenizer, within=parts), TokenizerOptions)
    add_keys(verb("prepare", "turn text into token shards with a manifest", prepare_tokens), PrepareOptions)


def train_tokenizer(options: argparse.Namespace) -> None:
    from argonne.prepare.planning import train_tokenizer_on_files

    print(train_tokenizer_on_files(chosen(TokenizerOptions, options)))


def prepare_tokens(options: argparse.Namespace) -> None:
    from argonne.prepare.prepare import prepare

    print(prepare(chosen(PrepareOptions, options)))
