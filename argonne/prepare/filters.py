"""What `argonne prepare` may leave out on purpose: low-quality text, evaluation text. Each reason is counted."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from argonne.errors import InputError, first_line
from argonne.prepare import columnar, grams
from argonne.prepare.documents import find_files
from argonne.prepare.grams import Gram, Wanted, blocks_of
from argonne.prepare.texts import Text, open_path
from argonne.prepare.textual import open_file

QUALITY_FROM_CHARACTERS = 50
LARGEST_DIGIT_SHARE = 0.5
SMALLEST_LETTER_SHARE = 0.3
FEWEST_TOKENS = 10
EVALUATION_SUFFIXES = {".csv": "csv", ".json": "json", ".tsv": "csv"}
SHOWN = 40  # characters of a text in a line for a person

Filter = Callable[[Text], bool]


def evaluation_files(patterns: Sequence[str]) -> list[dict[str, Any]]:
    """The evaluation files that the patterns match, each with the hash of its bytes: part of what decides which
    documents are left out.

    Raises InputError when a pattern matches nothing or a file cannot be read.
    """
    found = find_files(patterns, also=EVALUATION_SUFFIXES) if patterns else []
    return [{**dataclasses.asdict(file), "sha256": _digest(file.path)} for file in found]


def _digest(path: str) -> str:
    try:
        with open_path(path) as source:
            return hashlib.file_digest(source, "sha256").hexdigest()  # type: ignore[arg-type]
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
        found["contaminated"] = _evaluation(recipe, evaluation)[0].are_in
    return found


def coverage(recipe: dict[str, Any], evaluation: Sequence[dict[str, Any]]) -> str:
    """One line on which of the evaluation texts are looked for, and how."""
    counts, example = _evaluation(recipe, evaluation)[1:]
    shown = f" (first: {example[:SHOWN]!r})" if example is not None else ""
    return (
        f"decontamination: {sum(counts.values()):,} evaluation texts in {len(evaluation):,} files: "
        f"{counts['words']:,} by {grams.GRAM_WORDS} words, {counts['short']:,} by fewer, "
        f"{counts['characters']:,} by characters, {counts['none']:,} too short to be looked for{shown}"
    )


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


def _evaluation(
    recipe: dict[str, Any], evaluation: Sequence[dict[str, Any]]
) -> tuple[Wanted, Counter[str], str | None]:
    listed = tuple((file["path"], file["format"], file["sha256"]) for file in evaluation)
    return _wanted(listed, recipe.get("decontaminate_rule", 1))


@functools.lru_cache(maxsize=2)
def _wanted(listed: tuple[tuple[str, str, str], ...], rule: int) -> tuple[Wanted, Counter[str], str | None]:
    """(what is looked for, how many texts by `grams.how`, the first that is too short) of the evaluation files (path,
    format, sha256): every text in every field.

    Raises InputError when a file is not the one that was listed, and where every text is too short.
    """
    found, counts, example = set[Gram](), Counter[str](), None
    for path, kind, digest in listed:
        if _digest(path) != digest:
            raise InputError(
                f"--decontaminate {path}: has changed since the work began; restore it, or remove the output and start "
                "again"
            )
        for text in (text for value in _values(path, kind) for text in strings_in(value)):
            if words := grams.words_of(text, rule):
                counts[how := grams.how(words, rule)] += 1
                found.update(grams.grams_of(words, rule))
                if how == "none" and example is None:
                    example = text
    if not found:
        names = ", ".join(path for path, *_ in listed)
        fewest = grams.FEWEST_WORDS if rule > 1 else grams.GRAM_WORDS
        raise InputError(f"--decontaminate {names}: no text of {fewest} words or more in it")
    return Wanted(found, rule), counts, example


def _values(path: str, kind: str) -> Iterator[Any]:
    """Every row of an evaluation file. Raises InputError when it cannot be read: what is not read
    would be trained on.
    """
    faults: tuple[type[Exception], ...] = (csv.Error, RecursionError, *columnar.faults_of(path))
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
    except faults as error:
        raise InputError(
            f"--decontaminate {path}: cannot be read ({first_line(error)}); restore it or leave it out"
        ) from None
