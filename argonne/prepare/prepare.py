"""`argonne prepare`: files of text to a token set.

The plan lists the work units once; each unit becomes its own shards, written under a temporary name and renamed; the
manifest comes last. So the bytes do not depend on the number of workers, on the engine, or on interruptions, and
running the same command again finishes the work.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from argonne import files, layout
from argonne.errors import InputError, InUse, NothingMatches
from argonne.prepare import assemble, documents, encode, encoders, engines, filters, hold_out, messages
from argonne.prepare.documents import InputFile, Unit, find_files
from argonne.prepare.options import PrepareOptions, check_options
from argonne.prepare.planning import open_plan, sample_texts, turn, unit_weights, what_differs
from argonne.prepare.progress import ProgressBar
from argonne.tokens import manifest as manifests
from argonne.tokens import shards as tokens
from argonne.tokens.tokenizer import load_tokenizer

FAULTS = ("missing", "not-text", "empty", "invalid-utf8", "invalid-json")
PROBES, PROBE_CHARACTERS = 64, 1 << 16
WORKER_BYTES, FAST_WORKER_BYTES = 16 << 20, 96 << 20


def prepare(options: PrepareOptions, progress: ProgressBar | None = None) -> Path:
    """Write the token set `options.out` and return it. Running it again after an interruption finishes the work.

    Raises InputError for wrong input, for an output folder that holds something else, and when too many rows were no
    documents.
    """
    check_options(options)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder")
    if (out / layout.MANIFEST).exists() and not (out / layout.UNITS_PLAN).exists():
        check_complete(options, out)  # without a lock: it may lie where nothing can be written
        _refuse_changed_input(options, out)
        return out
    log = (progress or ProgressBar("prepare", 0)).log
    try:
        plan = open_plan(options, out)
        with ExitStack() as held:
            with turn(out):
                if (out / layout.MANIFEST).exists() or plan is None:
                    check_complete(options, out)
                    _refuse_changed_input(options, out)
                    return out
                held.enter_context(sole_writer(out, shared=options.part is not None))
            found, beside = [InputFile(**file) for file in plan["files"]], documents.not_taken(options.input, out)
            log(messages.input_summary(found, beside))
            if plan["recipe"]["decontaminate"]:
                log(filters.coverage(plan["recipe"], plan["evaluation_files"]))
            tokenizer = load_tokenizer(out / layout.TOKENIZER, plan["tokenizer"]["added_tokens"])
            log(tokenizer.ending_as(plan["tokenizer"]["eos_id"]).end_told)
            if options.part is None and options.engine == "local":
                files.collect_temporaries(out)
            encode_units(options, plan, out, progress)
            if options.part is not None:
                held.close()
            with turn(out):
                manifest = finish(options, plan, out) if options.part is None else _finish_last(options, plan, out, log)
    except OSError as error:
        raise InputError(messages.not_written(error, out)) from None
    for line in (messages.account(manifest), messages.held_out_warning(manifest)) if manifest is not None else ():
        if line:
            log(line)
    return out


def _finish_last(
    options: PrepareOptions, plan: dict[str, Any], out: Path, log: Callable[[str], None]
) -> dict[str, Any] | None:
    """Of several parts the one that ends last finishes the set."""
    assert options.part is not None
    part = f"part {options.part[0]}/{options.part[1]} is done"
    if (out / layout.MANIFEST).exists():
        log(f"{part}; another part has finished the set")
        return None
    if missing := len(plan["units"]) - len(encode.finished(out, len(plan["units"]))):
        log(f"{part}; {missing} units of other parts are not yet")
        return None
    with ExitStack() as held:
        try:
            held.enter_context(sole_writer(out, shared=False))
        except InputError:
            log(f"{part}; a part that still works here will finish the set")
            return None
        return finish(options, plan, out)


def check_complete(options: PrepareOptions, out: Path) -> None:
    """Raise InputError where the finished set in `out` is not what the options ask for."""
    manifest = manifests.read_manifest(out)
    if other := what_differs(options, manifest):
        raise InputError(f"{out}: holds a finished token set made with {other}; choose another --out or remove it")
    if (out / layout.UNITS_PLAN).exists():
        _clean(out)


def _refuse_changed_input(options: PrepareOptions, out: Path) -> None:
    if other := changed_input(options, out):
        raise InputError(
            f"{out}: {other}; the set is finished and stays as it is: choose another --out, or remove it and run again"
        )


def changed_input(options: PrepareOptions, out: Path) -> str | None:
    """Which of the files that the patterns match now are not, or not with this size, in the finished set. What is gone
    by now does not count, nor where the files lie.
    """
    try:
        found = find_files(options.input, outside=out)
    except NothingMatches:
        return None
    manifest = manifests.read_manifest(out)
    read = Counter((Path(source["path"]).name, source["bytes"]) for source in manifests.sources_of(out, manifest))
    others = []
    for file in found:
        if not read[known := (Path(file.path).name, file.bytes)]:
            others.append(file.path)
        read[known] -= 1
    more = f" and {len(others) - 1:,} more files" if len(others) > 1 else ""
    return f"{others[0]}{more} came or changed since it was made" if others else None


@contextmanager
def sole_writer(out: Path, *, shared: bool) -> Iterator[None]:
    """Hold the folder's lock while units are encoded; several `--part`s hold it together. The kernel frees it when a
    process dies.
    """
    with open(out / layout.TOKENS_LOCK, "w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            raise InUse(f"{out}: another `argonne prepare` is writing here; wait for it or end it") from None
        yield


def encode_units(options: PrepareOptions, plan: dict[str, Any], out: Path, progress: ProgressBar | None) -> None:
    """Encode what is not yet there of this part."""
    weights = unit_weights(plan)
    progress = progress or ProgressBar("prepare", sum(weights))
    records = encode.finished(out, len(plan["units"]))
    for number in [number for number, record in records.items() if not assemble.is_whole(plan["recipe"], record, out)]:
        progress.log(f"unit {number}: its shard is missing or was cut; it is made again")
        encode.record_path(out, number).unlink(missing_ok=True)
        del records[number]
    for number, record in records.items():
        progress.add(weights[number], record["documents"], record["tokens"], record["text_bytes"], fresh=False)
    count = DropCount(options.max_drop_fraction, out, plan)
    for number, record in records.items():
        count.add(number, record)
    count.check()
    wanted = [unit["index"] for unit in plan["units"] if unit["index"] not in records]
    if options.part is not None:
        part, parts = options.part
        wanted = [number for number in wanted if number % parts == part - 1]
    job = encode.Job(str(out), _encoder(options, plan, out, progress) if wanted else "tokenizers")
    workers = options.workers or _sensible_workers(options, job, weights, wanted)
    try:
        with closing(engines.run(options.engine, job, wanted, workers, options.jobs)) as results:
            for number, record in results:
                for warning in record["warnings"]:
                    progress.log(f"warning: unit {number}: {warning}")
                progress.add(weights[number], record["documents"], record["tokens"], record["text_bytes"])
                count.add(number, record)
                count.check()
    finally:
        progress.close()


def _sensible_workers(options: PrepareOptions, job: encode.Job, weights: list[int], wanted: list[int]) -> int:
    """A process takes seconds to load the tokenizer: each should have a minute's work. 0 leaves it to the engine."""
    if options.engine != "local":
        return 0
    each = FAST_WORKER_BYTES if job.encoder == "gigatoken" else WORKER_BYTES
    return max(1, min(os.cpu_count() or 1, sum(weights[number] for number in wanted) // each))


def _encoder(options: PrepareOptions, plan: dict[str, Any], out: Path, progress: ProgressBar) -> str:
    """Name of the encoder, after gigatoken was compared with the reference on hard probes and on the first documents of
    the input.
    """
    tokenizer = load_tokenizer(out / layout.TOKENIZER, plan["tokenizer"]["added_tokens"])
    first = sample_texts([InputFile(**file) for file in plan["files"]], [Unit(**plan["units"][0])], plan["recipe"])
    wanted = 0 if options.encoder == "tokenizers" else PROBES
    probes = [text[:PROBE_CHARACTERS] for text in itertools.islice(first, wanted)]
    name, reason = encoders.choose(tokenizer, options.encoder, probes)
    progress.log(reason)
    return name


def finish(options: PrepareOptions, plan: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write the manifest and the hash list, and remove what only the work needed; the manifest."""
    records = encode.finished(out, len(plan["units"]))
    ordered = [records[unit["index"]] for unit in plan["units"]]
    count = DropCount(options.max_drop_fraction, out, plan)
    for number, record in records.items():
        count.add(number, record)
    count.check()
    if count.kept == 0:
        raise InputError(
            f"{out}: no document is left of {count.rows:,} rows "
            f"({messages.describe_drops(count.drops) or 'it is empty'})"
        )
    if assemble.is_staged(plan["recipe"]):
        dtype, ends_are_held = (
            tokens.dtype_for(plan["tokenizer"]["vocab_size"]),
            hold_out.rule_of(plan) == hold_out.BY_CUT,
        )
        ordered = assemble.assemble(plan["recipe"], ordered, out, dtype, ends_are_held=ends_are_held)
    manifest = _manifest(plan, ordered)
    for leftover in files.collect_temporaries(out):
        ProgressBar("prepare", 0).log(f"removed the unfinished {leftover.name}")
    manifests.write_manifest(out, manifest)
    _clean(out)
    return manifest


class DropCount:
    """The rows of the units of a plan that are finished, and how many of them may be no documents."""

    def __init__(self, limit: float, out: Path, plan: dict[str, Any], error: type[InputError] = InputError) -> None:
        self._limit, self._out, self._error = limit, out, error
        self._weights = unit_weights(plan) if plan else []
        self._formats = [plan["files"][unit["file"]]["format"] for unit in plan["units"]] if plan else []
        self._left = Counter[str]()  # bytes still to come, by format: rows of one tell nothing of those of another
        for format, weight in zip(self._formats, self._weights, strict=True):
            self._left[format] += weight
        self._done, self._rows, self.drops, self.kept = Counter[str](), Counter[str](), Counter[str](), 0

    @property
    def rows(self) -> int:
        return self._rows.total()

    def add(self, number: int, record: Mapping[str, Any]) -> None:
        format, weight = self._formats[number], self._weights[number]
        self._rows[format] += record["rows"]
        self._done[format] += weight
        self._left[format] -= weight
        self.kept += record["documents"] + record["held_out"]["documents"]
        self.drops.update(record["drops"])

    def check(self, *, alone: bool = False) -> None:
        """Raise `error` where more rows are no documents than may be of all rows, as many as there will be by the
        share of the bytes that is done; `alone`: of those counted here.
        """
        left = {format: count for format, count in self._left.items() if count and not alone}
        if not all(self._done[format] for format in left):
            return
        expected = self.rows + round(sum(self._rows[format] * left[format] / self._done[format] for format in left))
        bad_rows = sum(self.drops[reason] for reason in FAULTS)
        if bad_rows > self._limit * max(expected, 1):
            of_all = "" if expected == self.rows else f" of the {expected:,} or so that there will be"
            advice = f": {found}" if (found := messages.advice(self.drops)) else ""
            raise self._error(
                f"{self._out}: {bad_rows:,} of {self.rows:,} rows are no documents "
                f"({messages.describe_drops(self.drops)}), more than --max-drop-fraction "
                f"{self._limit}{of_all}; mend the input{advice}, or raise the limit (of a training run: "
                "data.max_drop_fraction) and run again: the work so far is kept"
            )


def _manifest(plan: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest: what is in the set, what was left out and why, what it was made from. No times, no hosts: equal
    input, equal bytes.
    """
    of_file: list[list[dict[str, Any]]] = [[] for _ in plan["files"]]
    for record, unit in zip(records, plan["units"], strict=True):
        for number, own in enumerate(assemble.sources_of(record), unit["file"]):
            of_file[number].append(own)
    held = [record["held_out"] for record in records]
    return {
        "format": manifests.FORMAT,
        "format_version": manifests.FORMAT_VERSION,
        "dtype": tokens.dtype_for(plan["tokenizer"]["vocab_size"]),
        "tokenizer": plan["tokenizer"],
        **_totals([own for record in records for own in assemble.sources_of(record)]),
        "held_out": {
            "share": plan["recipe"]["hold_out"],
            "rule": hold_out.rule_of(plan),
            **tokens.totals_of(held),
            "shards": [shard for part in held for shard in part["shards"]],
        },
        "shards": [shard for record in records for shard in record["shards"]],
        "recipe": plan["recipe"],
        "plan": files.fingerprint(plan),
        "sources": [{**file, **_totals(own)} for file, own in zip(plan["files"], of_file, strict=True)],
        "evaluation_files": plan["evaluation_files"],
        "bad_files": plan["bad_files"] + [bad for record in records for bad in record["bad"]],
    }


def _totals(sources: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of what is counted of each file."""
    drops = Counter[str]()
    for own in sources:
        drops.update(own["drops"])
    return {
        **{name: sum(own[name] for own in sources) for name in assemble.COUNTS},
        "drops": dict(sorted(drops.items())),
    }


def _clean(out: Path) -> None:
    """Remove what only the work needed; also after a process died between the manifest and here."""
    for name in (layout.UNITS, assemble.PARTS, "slurm"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / layout.UNITS_PLAN).unlink(missing_ok=True)
    files.fsync_path(out)
