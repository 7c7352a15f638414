"""What `argonne prepare` may leave out on purpose: low-quality text, evaluation text. Each reason is counted."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import numpy as np

from argonne.errors import InputError, first_line
from argonne.prepare import columnar
from argonne.prepare.documents import find_files
from argonne.prepare.texts import LongText, Text, read_faults
from argonne.prepare.textual import open_file

QUALITY_FROM_CHARACTERS = 50
LARGEST_DIGIT_SHARE = 0.5
SMALLEST_LETTER_SHARE = 0.3
FEWEST_TOKENS = 10
GRAM_WORDS = 13
EVALUATION_SUFFIXES = {".csv": "csv", ".json": "json", ".tsv": "csv"}
WORD = re.compile(r"\w+")

Filter = Callable[[Text], bool]
Gram = tuple[str, ...]
Grams = Container[Gram]


def evaluation_files(patterns: Sequence[str]) -> list[dict[str, Any]]:
    """The evaluation files that the patterns match, each with the hash of its bytes: part of what decides which
    documents are left out.

    Raises InputError when a pattern matches nothing or a file cannot be read.
    """
    found = find_files(patterns, also=EVALUATION_SUFFIXES) if patterns else []
    return [{**dataclasses.asdict(file), "sha256": _digest(file.path)} for file in found]


def _digest(path: str) -> str:
    import fsspec

    try:
        with fsspec.open(path, "rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"--decontaminate {path}: cannot be read ({first_line(error)}); restore it or leave it out"
        ) from None


def build(recipe: dict[str, Any], evaluation: Sequence[dict[str, Any]]) -> dict[str, Filter]:
    """The filters that a recipe asks for, by the reason under which they count. `evaluation`: what `evaluation_files`
    found for it.
    """
    found: dict[str, Filter] = {}
    if "quality" in recipe["filter"]:
        found["quality"] = is_low_quality
    if recipe["decontaminate"]:
        grams = evaluation_grams(tuple((file["path"], file["format"], file["sha256"]) for file in evaluation))
        found["contaminated"] = functools.partial(shares_a_gram, *grams)
    return found


def blocks_of(text: Text) -> Iterator[str]:
    return text.blocks() if isinstance(text, LongText) else iter([text])


def is_low_quality(text: Text) -> bool:
    """Argonne 2.0's rule: over 50 characters, and mostly digits or hardly any letters and white space."""
    length = digits = letters = 0
    for block in blocks_of(text):
        length += len(block)
        digits += sum(map(str.isdigit, block))
        letters += sum(map(str.isalpha, block)) + sum(map(str.isspace, block))
    if length <= QUALITY_FROM_CHARACTERS:
        return False
    return digits / length > LARGEST_DIGIT_SHARE or letters / length < SMALLEST_LETTER_SHARE


def _words(text: Text) -> Iterator[list[str]]:
    """Lower-case words, block by block; each block begins with the last words of the one before, so that no gram is
    lost between them.
    """
    carried: list[str] = []
    tail = ""
    for block in blocks_of(text):
        block = tail + block
        cut = max(block.rfind(" "), block.rfind("\n")) if isinstance(text, LongText) else -1
        block, tail = (block[:cut], block[cut:]) if cut > 0 else (block, "")
        words = carried + words_of(block)
        yield words
        carried = words[-(GRAM_WORDS - 1) :]
    if tail:
        yield carried + words_of(tail)


def grams_of(words: Sequence[str]) -> Iterator[Gram]:
    """All runs of 13 words."""
    return (tuple(words[start : start + GRAM_WORDS]) for start in range(len(words) - GRAM_WORDS + 1))


def words_of(text: str) -> list[str]:
    """Its words: case and punctuation do not count."""
    return WORD.findall(text.lower())


def shared_grams(grams: Grams, beginnings: Grams, text: Text) -> Iterator[Gram]:
    """The runs of 13 words in the text that are among the `grams`. `beginnings`: the first three words of each of them,
    which nearly always decide.
    """
    for words in _words(text):
        for start in range(len(words) - GRAM_WORDS + 1):
            if (words[start], words[start + 1], words[start + 2]) in beginnings:
                gram = tuple(words[start : start + GRAM_WORDS])
                if gram in grams:
                    yield gram


def shares_a_gram(grams: Grams, beginnings: Grams, text: Text) -> bool:
    """Does the text hold 13 words in a row that an evaluation text holds too?"""
    return next(shared_grams(grams, beginnings, text), None) is not None


def strings_in(value: Any) -> Iterator[str]:
    """Every text of a row, whatever its fields are."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings_in(inner)
    elif isinstance(value, list | tuple | np.ndarray):
        for inner in value:
            yield from strings_in(inner)


@functools.lru_cache(maxsize=2)
def evaluation_grams(listed: tuple[tuple[str, str, str], ...]) -> tuple[frozenset[Gram], frozenset[Gram]]:
    """All 13-word runs of the evaluation files (path, format, sha256), of every text in every field, and the first
    three words of each.

    Raises InputError when a file is not the one that was listed or no text has 13 words.
    """
    grams: set[Gram] = set()
    for path, kind, digest in listed:
        if _digest(path) != digest:
            raise InputError(
                f"--decontaminate {path}: has changed since the work began; restore it, or remove the output and start "
                "again"
            )
        for value in _values(path, kind):
            for text in strings_in(value):
                grams.update(grams_of(words_of(text)))
    if not grams:
        names = ", ".join(path for path, *_ in listed)
        raise InputError(f"--decontaminate {names}: no text of {GRAM_WORDS} words or more in it")
    return frozenset(grams), frozenset(gram[:3] for gram in grams)


def _values(path: str, kind: str) -> Iterator[Any]:
    """Every row of an evaluation file. Raises InputError when it cannot be read: what is not read
    would be trained on.
    """
    import pyarrow as pa

    try:
        if kind in ("parquet", "arrow"):
            yield from columnar.every_row(path, kind)
            return
        with open_file(path) as source:
            if kind == "jsonl":
                yield from (json.loads(line) for line in source if line.strip())
            elif kind == "json":
                yield json.load(source)
            elif kind == "csv":
                separator = "\t" if path.lower().endswith(".tsv") else ","
                yield from csv.reader((line.decode() for line in source), delimiter=separator)
            else:
                yield source.read().decode()
    except (pa.ArrowException, csv.Error, RecursionError, *read_faults(path)) as error:
        raise InputError(
            f"--decontaminate {path}: cannot be read ({first_line(error)}); restore it or leave it out"
        ) from None
