"""The plan of `argonne prepare`: which files there are, how they are cut into units of work, with which tokenizer.
Written once, by one process.
"""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from argonne import files, layout
from argonne.errors import InputError
from argonne.prepare import documents, filters, hold_out, messages
from argonne.prepare.documents import InputFile, Unit
from argonne.prepare.options import PrepareOptions, TokenizerOptions, check_split
from argonne.prepare.progress import ProgressBar
from argonne.prepare.texts import LongText, RowBatch
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer, special_tokens, train_tokenizer

# Version 1: a unit is of one file, and places in it are held out.
PLAN_VERSION, READ_VERSIONS = 2, (1, 2)
TOKENIZER_CHARACTERS = 500_000_000


@contextmanager
def turn(out: Path) -> Iterator[None]:
    """One process at a time plans, and one finishes; others wait. A folder that was made for this and stayed empty is
    removed again.
    """
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with open(out / layout.TOKENS_TURN, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    finally:
        if made and {entry.name for entry in out.iterdir()} <= {layout.TOKENS_TURN}:
            shutil.rmtree(out, ignore_errors=True)


def open_plan(options: PrepareOptions, out: Path) -> dict[str, Any] | None:
    """The plan of `out`: the one that lies there, if it is of the same input and options, else a new one; None where
    the set is finished.

    Raises InputError before anything is written where the input, the options or the folder are wrong.
    """
    if (out / layout.UNITS_PLAN).exists():
        with turn(out):
            if (plan := _known_plan(options, out)) is not None:
                return plan
    if (out / layout.MANIFEST).exists():
        return None
    ours = {layout.TOKENS_LOCK, layout.TOKENS_TURN, layout.TOKENIZER}
    foreign = out.exists() and any(
        entry.name not in ours and not entry.name.startswith(files.TEMPORARY) for entry in out.iterdir()
    )
    # Looked for once more: another process may have planned, or finished, since the first look.
    if foreign and not (out / layout.UNITS_PLAN).exists() and not (out / layout.MANIFEST).exists():
        raise InputError(f"{out}: exists and holds no plan of `argonne prepare`; choose another --out or remove it")
    if options.train_tokenizer is not None:
        special_tokens(options.train_tokenizer, bare=options.bare)
    found = documents.find_files(options.input, outside=out)
    units, bad = _cut_all(options, found)
    _check_text(options, found, units)
    every = (len(batch.texts) for unit in units for batch in _read(found, unit, options.recipe()))
    rule = hold_out.rule_for(options.hold_out, every)
    evaluation = filters.evaluation_files(options.decontaminate)
    filters.build(options.recipe(), evaluation)  # those that cannot be read are refused here
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer, options.added_tokens)
    with turn(out):
        if (plan := _known_plan(options, out)) is not None or (out / layout.MANIFEST).exists():
            return plan
        if tokenizer is None:
            assert options.train_tokenizer is not None
            if not (out / layout.TOKENIZER / layout.TOKENIZER_FILE).exists():
                texts = sample_texts(found, units, options.recipe())
                _train(texts, options.train_tokenizer, out / layout.TOKENIZER, options.bare)
            tokenizer = load_tokenizer(out / layout.TOKENIZER, options.added_tokens)
        plan = {
            "format_version": PLAN_VERSION,
            "recipe": options.recipe(),
            "tokenizer": _described(options, tokenizer),
            "hold_out_rule": rule,
            "files": [dataclasses.asdict(file) for file in found],
            "bad_files": bad,
            "evaluation_files": evaluation,
            "units": [dataclasses.asdict(unit) for unit in units],
        }
        if options.tokenizer is not None:
            tokenizer.save(out / layout.TOKENIZER)
        files.write_json(out / layout.UNITS_PLAN, plan)
        return plan


def _known_plan(options: PrepareOptions, out: Path) -> dict[str, Any] | None:
    if not (out / layout.UNITS_PLAN).exists() or (out / layout.MANIFEST).exists():
        return None
    plan: dict[str, Any] = files.read_json(out / layout.UNITS_PLAN)
    if plan.get("format_version") not in READ_VERSIONS:
        raise InputError(
            f"{out / layout.UNITS_PLAN}: version {plan.get('format_version')}, this argonne reads "
            f"{' and '.join(map(str, READ_VERSIONS))}; remove {out} and start again"
        )
    listed = {file["path"]: file["bytes"] for file in plan["files"]}
    found = {file.path: file.bytes for file in documents.find_files(options.input, outside=out)}
    if other := what_differs(options, plan):
        problem = f"holds unfinished work with {other}; use the same as then"
    elif changed := sorted(path for path in listed | found if listed.get(path) != found.get(path)):
        more = f" and {len(changed) - 1:,} more input files have" if len(changed) > 1 else " has"
        problem = f"{changed[0]}{more} come, gone or changed in size since the work began; restore what was there"
    elif plan["evaluation_files"] != filters.evaluation_files(options.decontaminate):
        problem = "the --decontaminate files have changed since the work began; restore them"
    else:
        return plan
    raise InputError(f"{out}: {problem}, choose another --out, or remove it")


def what_differs(options: PrepareOptions, made: dict[str, Any]) -> str | None:
    """What is other in the options than in the plan or the manifest `made`."""
    recipe = options.recipe()
    if "decontaminate_rule" not in made["recipe"]:  # made by the rule of before, and finished by it
        recipe.pop("decontaminate_rule", None)
    if made["recipe"] != recipe:
        return f"other options ({', '.join(name for name in recipe if made['recipe'].get(name) != recipe[name])})"
    if options.tokenizer is None:
        return None
    tokenizer = load_tokenizer(options.tokenizer)
    if tokenizer.fingerprint != made["tokenizer"]["fingerprint"]:
        return "another tokenizer"
    # Earlier sets of a tokenizer whose eos_token ends a turn end their documents with that.
    return None if made["tokenizer"]["eos_id"] in tokenizer.stop_ids else "another end of documents"


def _described(options: PrepareOptions, tokenizer: TextTokenizer) -> dict[str, Any]:
    """What the plan and the manifest say of the tokenizer. Raises InputError where it lacks a token that the documents
    need.
    """
    if tokenizer.eos_id is None:
        raise InputError(
            f"tokenizer {tokenizer.folder}: names no end-of-text token, and each document ends with one; set eos_token "
            "in tokenizer_config.json"
        )
    if options.bos and tokenizer.bos_id is None:
        raise InputError(
            f"tokenizer {tokenizer.folder}: names no bos_token, which --bos asks for; set it in tokenizer_config.json "
            "or leave --bos out"
        )
    used = {tokenizer.bos_id} if options.bos and tokenizer.bos_id is not None else set[int]()
    tokenizer.check_text(tokenizer.controls | used)
    return {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id if options.bos else None,
        "added_tokens": options.added_tokens,
    }


def _cut_all(options: PrepareOptions, found: list[InputFile]) -> tuple[list[Unit], list[dict[str, str]]]:
    bad: list[dict[str, str]] = []

    def unreadable(file: InputFile, error: InputError) -> None:
        if not options.skip_bad_shards:
            raise error
        bad.append({"path": file.path, "error": str(error)})

    units = documents.cut_all(found, options.text_column, unreadable)
    if not units:
        problem = f"no file of it can be read; first: {bad[0]['error']}" if bad else "holds no row"
        raise InputError(f"input {', '.join(options.input)}: {problem}")
    return units, bad


def _check_text(options: PrepareOptions, found: list[InputFile], units: list[Unit]) -> None:
    dropped = Counter[str]()
    if next(sample_texts(found, units, options.recipe(), dropped), None) is None:
        raise InputError(messages.no_text(found, options.text_column, dropped))


def _read(found: list[InputFile], unit: Unit, recipe: dict[str, Any]) -> Iterator[RowBatch]:
    """The rows of a unit, without those of a file that cannot be read where such are passed over."""
    for file in found[unit.file : unit.file + unit.files]:
        try:
            yield from documents.read_unit(file, unit, recipe["text_column"], recipe["split"])
        except InputError:
            if not recipe["skip_bad_shards"]:
                raise


def sample_texts(
    found: list[InputFile], units: list[Unit], recipe: dict[str, Any], dropped: Counter[str] | None = None
) -> Iterator[str]:
    """Documents to train a tokenizer on, long ones block by block: the same share of every unit, at most 500 million
    characters together. Drops are added to `dropped`.
    """
    share = TOKENIZER_CHARACTERS // len(units)
    for unit in units:
        left = share
        for batch in _read(found, unit, recipe):
            if dropped is not None:
                dropped.update(batch.drops)
            for block in (block for text in batch.texts for block in _blocks(text)):
                yield block[:left]
                left -= len(block)
                if left <= 0:
                    break
            if left <= 0:
                break


def _blocks(text: str | LongText) -> Iterator[str]:
    return iter((text,)) if isinstance(text, str) else filter(None, text.blocks())


def _train(texts: Iterator[str], vocab_size: int, out: Path, bare: bool) -> Path:
    """Train a tokenizer, and say so where the text gave fewer entries than were asked for."""
    train_tokenizer(texts, vocab_size, out, bare=bare)
    if (found := load_tokenizer(out).vocab_size) < vocab_size:
        ProgressBar("tokenizer", 0).log(
            f"warning: the text gave a tokenizer of {found:,} entries, asked for were {vocab_size:,}: no other pair of "
            "tokens comes twice; give more text, or ask for fewer"
        )
    return out


def train_tokenizer_on_files(flags: TokenizerOptions) -> Path:
    """`argonne tokenizer train`: byte-level BPE on the files that the globs match."""
    check_split(flags.split)
    special_tokens(flags.vocab_size, bare=flags.bare)
    options = PrepareOptions(
        flags.input, flags.out, train_tokenizer=flags.vocab_size, text_column=flags.text_column, split=flags.split
    )
    found = documents.find_files(flags.input)
    print(messages.input_summary(found, documents.not_taken(flags.input)), file=sys.stderr)
    units, _ = _cut_all(options, found)
    _check_text(options, found, units)
    return _train(sample_texts(found, units, options.recipe()), flags.vocab_size, flags.out, flags.bare)


def unit_weights(plan: dict[str, Any]) -> list[int]:
    """Input bytes of each unit, for the progress line."""
    count = Counter(unit["file"] for unit in plan["units"])
    units = (Unit(**unit) for unit in plan["units"])
    return [
        sum(file["bytes"] for file in plan["files"][unit.file : unit.file + unit.files]) // count[unit.file]
        for unit in units
    ]
