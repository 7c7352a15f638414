"""tokenizer, prepare: from text to tokens."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from argonne.cli.command import Verbs, add_keys, chosen
from argonne.prepare.options import PrepareOptions, TokenizerOptions


def add_verbs(verb: Verbs, arguments: Sequence[str]) -> None:
    tokenizer = verb("tokenizer", train_tokenizer)
    tokenizer.add_argument("action", choices=("train",), metavar="train")
    add_keys(tokenizer, TokenizerOptions)
    add_keys(verb("prepare", prepare_tokens), PrepareOptions)


def train_tokenizer(options: argparse.Namespace) -> None:
    from argonne.prepare.planning import train_tokenizer_on_files

    print(train_tokenizer_on_files(chosen(TokenizerOptions, options)))


def prepare_tokens(options: argparse.Namespace) -> None:
    from argonne.prepare.prepare import prepare

    print(prepare(chosen(PrepareOptions, options)))
