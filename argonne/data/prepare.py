"""`argonne prepare`: files of text to a token set.

The plan lists the work units once; each unit becomes its own shards, written under a temporary name and renamed; the manifest comes
last. So the bytes do not depend on the number of workers, on the engine, or on interruptions, and running the same command again
finishes the work.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne import files
from argonne.data import assemble, documents, encode, encoders, engines, filters, messages, tokens
from argonne.data.documents import InputFile, Unit
from argonne.data.messages import describe_drops
from argonne.data.progress import Progress
from argonne.data.tokenizer import load_tokenizer, train_tokenizer
from argonne.errors import InputError

PLAN = "plan.json"
PLAN_VERSION = 1
PROBES = 64
WORKER_BYTES, FAST_WORKER_BYTES = 16 << 20, 256 << 20
TOKENIZER_CHARACTERS = 500_000_000
FAULTS = ("missing", "not-text", "empty", "invalid-utf8", "invalid-json")
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


def prepare(options: PrepareOptions, progress: Progress | None = None) -> Path:
    """Write the token set `options.out` and return it. Running it again after an interruption finishes the work.

    Raises InputError for wrong input, for an output folder that holds something else, and when too many rows were no documents.
    """
    check_options(options)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder")
    if (out / tokens.MANIFEST).exists():
        return _already_complete(options, out)
    try:
        return _prepare(options, out, progress)
    except OSError as error:
        raise InputError(messages.not_written(error, out)) from None


def _prepare(options: PrepareOptions, out: Path, progress: Progress | None) -> Path:
    plan = open_plan(options, out)
    (progress or Progress("prepare", 0)).say(messages.input_summary([InputFile(**file) for file in plan["files"]]))
    with sole_writer(out, shared=options.part is not None):
        records = encode_units(options, plan, out, progress)
        if options.part is not None and len(records) < len(plan["units"]):
            missing = len(plan["units"]) - len(records)
            (progress or Progress("prepare", 0)).say(
                f"part {options.part[0]}/{options.part[1]} is done; {missing} units of other parts are not yet"
            )
            return out
        manifest = finish(options, plan, records, out)
    for line in (messages.account(manifest), messages.held_out_warning(manifest)):
        if line:
            (progress or Progress("prepare", 0)).say(line)
    return out


def _already_complete(options: PrepareOptions, out: Path) -> Path:
    manifest = tokens.read_manifest(out)
    if manifest["recipe"] != options.recipe():
        changed = [name for name, value in options.recipe().items() if manifest["recipe"].get(name) != value]
        raise InputError(
            f"{out}: holds a finished token set made with other options ({', '.join(changed)}); choose another --out or remove it"
        )
    if options.tokenizer is not None and load_tokenizer(options.tokenizer).fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise InputError(f"{out}: holds a finished token set of another tokenizer; choose another --out or remove it")
    if (out / PLAN).exists():
        _clean(out)
    return out


@contextmanager
def sole_writer(out: Path, *, shared: bool) -> Iterator[None]:
    """Hold the folder's lock; several `--part`s hold it together. The kernel frees it when a process dies."""
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{out}: another `argonne prepare` is writing here; wait for it or end it") from None
        yield


def open_plan(options: PrepareOptions, out: Path) -> dict[str, Any]:
    """The plan of `out`: the one that lies there, if it is of the same input and options, else a new one."""
    path = out / PLAN
    if path.exists():
        plan: dict[str, Any] = files.read_json(path)
        _check_plan(options, plan, out)
        return plan
    if out.exists() and any(
        entry.name not in (".lock", "tokenizer") and not entry.name.startswith(files.TEMPORARY) for entry in out.iterdir()
    ):
        raise InputError(f"{out}: exists and holds no plan of `argonne prepare`; choose another --out or remove it")
    found = documents.find_files(options.input, outside=out)
    cuts, bad = _cut_all(options, found)
    # A column that no row has, and evaluation files that cannot be read, are refused before anything is written.
    _check_text(options, found, cuts)
    filters.build(options.recipe())
    tokenizer = (
        load_tokenizer(options.tokenizer, options.added_tokens) if options.tokenizer is not None else _train(options, found, cuts, out)
    )
    if tokenizer.eos_id is None:
        raise InputError(
            f"tokenizer {tokenizer.folder}: names no end-of-text token, and each document ends with one; set "
            "eos_token in tokenizer_config.json"
        )
    if options.bos and tokenizer.bos_id is None:
        raise InputError(
            f"tokenizer {tokenizer.folder}: names no bos_token, which --bos asks for; set it in tokenizer_config.json or leave --bos out"
        )
    if options.tokenizer is not None:
        tokenizer.save(out / "tokenizer")
    out.mkdir(parents=True, exist_ok=True)
    plan = {
        "format_version": PLAN_VERSION,
        "recipe": options.recipe(),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "bos_id": tokenizer.bos_id if options.bos else None,
            "added_tokens": options.added_tokens,
        },
        "files": [dataclasses.asdict(file) for file in found],
        "bad_files": bad,
        "units": [dataclasses.asdict(unit) for unit in cuts],
    }
    files.write_json(path, plan)
    return plan


def _cut_all(options: PrepareOptions, found: list[InputFile]) -> tuple[list[Unit], list[dict[str, str]]]:
    target = documents.unit_bytes(found)
    units: list[Unit] = []
    bad: list[dict[str, str]] = []
    for number, file in enumerate(found):
        try:
            pieces = documents.cut(number, file, target, options.text_column, options.split)
        except InputError as error:
            if not options.skip_bad_shards:
                raise
            bad.append({"path": file.path, "error": str(error)})
            continue
        units += [Unit(len(units) + index, number, start, stop) for index, (start, stop) in enumerate(pieces)]
    if not units:
        problem = f"no file of it can be read; first: {bad[0]['error']}" if bad else "holds no row"
        raise InputError(f"input {', '.join(options.input)}: {problem}")
    return units, bad


def _check_text(options: PrepareOptions, found: list[InputFile], units: list[Unit]) -> None:
    dropped = Counter[str]()
    if next(sample_texts(found, units, options.text_column, options.split, options.skip_bad_shards, dropped), None) is None:
        raise InputError(messages.no_text(found, options.text_column, dropped))


def _train(options: PrepareOptions, found: list[InputFile], units: list[Unit], out: Path) -> Any:
    assert options.train_tokenizer is not None
    if not (out / "tokenizer" / "tokenizer.json").exists():
        texts = sample_texts(found, units, options.text_column, options.split, options.skip_bad_shards)
        train_tokenizer(texts, options.train_tokenizer, out / "tokenizer", bare=options.bare)
    return load_tokenizer(out / "tokenizer", options.added_tokens)


def sample_texts(
    found: list[InputFile], units: list[Unit], text_column: str, split: str, skip_bad: bool = False, dropped: Counter[str] | None = None
) -> Iterator[str]:
    """Documents to train a tokenizer on: the same share of every unit, at most 500 million characters together. Drops are added to `dropped`."""
    share = TOKENIZER_CHARACTERS // len(units)
    for unit in units:
        characters = 0
        try:
            for batch in documents.read_unit(found[unit.file], unit, text_column, split):
                yield from (text if isinstance(text, str) else next(text.blocks()) for text in batch.texts)
                characters += batch.characters
                if dropped is not None:
                    dropped.update(batch.drops)
                if characters >= share:
                    break
        except InputError:
            if not skip_bad:
                raise


def train_tokenizer_on_files(
    patterns: tuple[str, ...], vocab_size: int, out: Path, *, bare: bool = False, text_column: str = "text", split: str = "file"
) -> Path:
    """`argonne tokenizer train`: byte-level BPE on the files that the globs match."""
    options = PrepareOptions(input=tuple(patterns), out=out, train_tokenizer=vocab_size, text_column=text_column, split=split)
    found = documents.find_files(patterns)
    units, _ = _cut_all(options, found)
    _check_text(options, found, units)
    return train_tokenizer(sample_texts(found, units, text_column, split), vocab_size, Path(out), bare=bare)


def _check_plan(options: PrepareOptions, plan: dict[str, Any], out: Path) -> None:
    if plan.get("format_version") != PLAN_VERSION:
        raise InputError(
            f"{out / PLAN}: version {plan.get('format_version')}, this argonne writes {PLAN_VERSION}; remove {out} and start again"
        )
    changed = [name for name, value in options.recipe().items() if plan["recipe"].get(name) != value]
    if changed:
        raise InputError(
            f"{out}: holds unfinished work with other options ({', '.join(changed)}); use the same ones, choose another --out, or remove it"
        )
    if options.tokenizer is not None and load_tokenizer(options.tokenizer).fingerprint != plan["tokenizer"]["fingerprint"]:
        raise InputError(f"{out}: holds unfinished work with another tokenizer; use the same one, choose another --out, or remove it")
    listed = [(file["path"], file["bytes"]) for file in plan["files"]]
    if listed != [(file.path, file.bytes) for file in documents.find_files(options.input, outside=out)]:
        raise InputError(f"{out}: the input files have changed since the work began; restore them, choose another --out, or remove it")


def unit_weights(plan: dict[str, Any]) -> list[int]:
    """Input bytes of each unit, for the progress line."""
    count: dict[int, int] = {}
    for unit in plan["units"]:
        count[unit["file"]] = count.get(unit["file"], 0) + 1
    return [plan["files"][unit["file"]]["bytes"] // count[unit["file"]] for unit in plan["units"]]


def encode_units(options: PrepareOptions, plan: dict[str, Any], out: Path, progress: Progress | None) -> dict[int, dict[str, Any]]:
    """Encode what is not yet there of this part; the records of all finished units by unit number."""
    weights = unit_weights(plan)
    progress = progress or Progress("prepare", sum(weights))
    encode._context.cache_clear()  # one process may write the same folder again, after it was removed
    records = encode.finished(out, len(plan["units"]))
    for number in [number for number, record in records.items() if not assemble.is_whole(plan["recipe"], record, out)]:
        progress.say(f"unit {number}: its shard is missing or was cut; it is made again")
        encode.record_path(out, number).unlink(missing_ok=True)
        del records[number]
    for number, record in records.items():
        progress.add(weights[number], record["documents"], record["tokens"], record["text_bytes"], fresh=False)
    wanted = [unit["index"] for unit in plan["units"] if unit["index"] not in records]
    if options.part is not None:
        part, parts = options.part
        wanted = [number for number in wanted if number % parts == part - 1]
    job = encode.Job(str(out), _encoder(options, plan, out, progress) if wanted else "tokenizers")
    try:
        for number, record in engines.run(options.engine, job, wanted, options.workers or _sensible_workers(options, job, weights, wanted)):
            records[number] = record
            for warning in record["warnings"]:
                progress.say(f"warning: unit {number}: {warning}")
            progress.add(weights[number], record["documents"], record["tokens"], record["text_bytes"])
    finally:
        progress.close()
    return encode.finished(out, len(plan["units"]))


def _sensible_workers(options: PrepareOptions, job: encode.Job, weights: list[int], wanted: list[int]) -> int:
    """A process takes seconds to load the tokenizer: each should have a minute's work. 0 leaves it to the engine."""
    if options.engine != "local":
        return 0
    each = FAST_WORKER_BYTES if job.encoder == "gigatoken" else WORKER_BYTES
    return max(1, min(os.cpu_count() or 1, sum(weights[number] for number in wanted) // each))


def _encoder(options: PrepareOptions, plan: dict[str, Any], out: Path, progress: Progress) -> str:
    """Name of the encoder, after gigatoken was compared with the reference on hard probes and on the first documents of the input."""
    units = [Unit(**unit) for unit in plan["units"]]
    found = [InputFile(**file) for file in plan["files"]]
    tokenizer = load_tokenizer(out / "tokenizer", plan["tokenizer"]["added_tokens"])
    probes: list[str] = []
    if options.encoder != "tokenizers":
        recipe = plan["recipe"]
        probes = list(
            itertools.islice(sample_texts(found, units[:1], recipe["text_column"], recipe["split"], recipe["skip_bad_shards"]), PROBES)
        )
    choice = encoders.choose(tokenizer, options.encoder, probes)
    progress.say(choice.reason)
    return choice.encoder.name


def finish(options: PrepareOptions, plan: dict[str, Any], records: dict[int, dict[str, Any]], out: Path) -> dict[str, Any]:
    """Write the manifest and the hash list, and remove what only the work needed; the manifest."""
    ordered = [records[unit["index"]] for unit in plan["units"]]
    _check_drops(options, ordered, out)
    if assemble.is_staged(plan["recipe"]):
        ordered = assemble.assemble(plan["recipe"], ordered, out, tokens.dtype_for(plan["tokenizer"]["vocab_size"]))
    manifest = build_manifest(plan, ordered)
    for leftover in files.collect_temporaries(out):
        (Progress("prepare", 0)).say(f"removed the unfinished {leftover.name}")
    tokens.write_manifest(out, manifest)
    _clean(out)
    return manifest


def _clean(out: Path) -> None:
    """Remove what only the work needed; also after a process died between the manifest and here."""
    encode.remove_records(out)
    assemble.remove_parts(out)
    shutil.rmtree(out / "slurm", ignore_errors=True)
    (out / PLAN).unlink(missing_ok=True)
    files.fsync_path(out)


def _check_drops(options: PrepareOptions, records: list[dict[str, Any]], out: Path) -> None:
    manifest = _totals(records)
    bad_rows = sum(manifest["drops"].get(reason, 0) for reason in FAULTS)
    if bad_rows > options.max_drop_fraction * max(manifest["rows"], 1):
        raise InputError(
            f"{out}: {bad_rows:,} of {manifest['rows']:,} rows are no documents ({describe_drops(manifest['drops'])}), more than "
            f"--max-drop-fraction {options.max_drop_fraction}; mend the input{messages.advice(manifest['drops'])}, or raise the limit and "
            "run again: the work so far is kept"
        )
    if manifest["documents"] + manifest["held_out_documents"] == 0:
        raise InputError(f"{out}: no document is left of {manifest['rows']:,} rows ({describe_drops(manifest['drops']) or 'it is empty'})")


def build_manifest(plan: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest: what is in the set, what was left out and why, what it was made from. No times, no hosts: equal input, equal bytes."""
    sources = []
    for number, file in enumerate(plan["files"]):
        own = [record for record, unit in zip(records, plan["units"], strict=True) if unit["file"] == number]
        sources.append({**file, **_totals(own)})
    held = [record["held_out"] for record in records]
    return {
        "format": tokens.FORMAT,
        "format_version": tokens.FORMAT_VERSION,
        "dtype": tokens.dtype_for(plan["tokenizer"]["vocab_size"]),
        "tokenizer": plan["tokenizer"],
        **_totals(records),
        "held_out": {
            "share": plan["recipe"]["hold_out"],
            **{name: sum(part[name] for part in held) for name in ("tokens", "documents", "text_bytes")},
            "shards": [shard for part in held for shard in part["shards"]],
        },
        "shards": [shard for record in records for shard in record["shards"]],
        "recipe": plan["recipe"],
        "plan": files.fingerprint(plan),
        "sources": sources,
        "bad_files": plan["bad_files"] + [bad for record in records for bad in record["bad"]],
    }


def _totals(records: list[dict[str, Any]]) -> dict[str, Any]:
    totals: dict[str, Any] = {name: sum(record[name] for record in records) for name in ("rows", "documents", "tokens", "text_bytes")}
    totals["held_out_documents"] = sum(record["held_out"]["documents"] for record in records)
    drops: dict[str, int] = {}
    for record in records:
        for reason, count in record["drops"].items():
            drops[reason] = drops.get(reason, 0) + count
    return {**totals, "drops": dict(sorted(drops.items()))}
