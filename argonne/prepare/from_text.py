"""Training from text: the work of `argonne prepare` goes on beside the trainer, which reads each shard once it is
finished.

Bytes, order and position are those of `prepare` and then training, because it is the same plan and the same code. A
background process (this module run with `-m`) does the work; it ends with the trainer that started it, and the next
start goes on where it ended.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from argonne import files, layout
from argonne.config import DataSection
from argonne.errors import InputError, InUse, NothingMatches, TextEnds
from argonne.jobs import JobSettings
from argonne.prepare import documents, encode, engines, messages, planning, prepare
from argonne.prepare.options import PrepareOptions
from argonne.tokens import shards as tokens
from argonne.tokens.manifest import read_manifest
from argonne.tokens.shards import Shard, TokenSet, TokenStream

FAILURE = "failure.json"
POLL_SECONDS = 0.2
RESTARTS = 3


def options_of(data: DataSection, run_folder: Path | None) -> PrepareOptions:
    """The `prepare` that `data.input` stands for. Of its globs the first that matches is used. Raises InputError when
    none does.
    """
    if run_folder is None:
        raise InputError(
            "data.input: needs a run folder to write the tokens into; prepare them with `argonne prepare` and name "
            "them in data.sources"
        )
    if data.tokenizer is None:
        raise InputError("data.tokenizer: not set, and data.input needs one; give the tokenizer's folder")
    return PrepareOptions(
        input=(_begun_with(data.input, run_folder / layout.RUN_TOKENS) or first_match(data.input),),
        out=run_folder / layout.RUN_TOKENS,
        tokenizer=Path(data.tokenizer),
        text_column=data.text_column,
        filter=("quality",) if data.quality_filter else (),
        hold_out=data.hold_out,
        bos=data.bos,
        max_drop_fraction=data.max_drop_fraction,
    )


def _begun_with(patterns: Sequence[str], folder: Path) -> str | None:
    """The pattern that the run began with, where it is still asked for: text that is tokenised may be gone, another
    pattern may match by now.
    """
    # The plan goes once the manifest is there, perhaps between two looks.
    for name in (layout.UNITS_PLAN, layout.MANIFEST):
        if not (folder / name).exists():
            continue
        try:
            begun = files.read_json(folder / name)["recipe"]["input"]
        except InputError:
            continue  # gone this moment; what is damaged is named when it is opened
        return next((pattern for pattern in patterns if [pattern] == begun), None)
    return None


def first_match(patterns: Sequence[str]) -> str:
    for pattern in patterns:
        try:
            documents.find_files((pattern,))
        except NothingMatches:
            continue
        return pattern
    raise InputError(
        f"data.input: none of {', '.join(map(repr, patterns))} matches a file; check the folder and the patterns"
    )


class GrowingStream(TokenStream):
    """The training tokens of a set that is still being written. What lies past the finished units is waited for."""

    def __init__(self, work: TextWork) -> None:
        super().__init__([])
        self._work = work
        self._whole = False
        self._changing = threading.Lock()
        self._impatient = threading.Event()

    def __reduce__(self) -> tuple[Any, ...]:
        """For ranks that have none of the files (`reader = "rank-0"`): where everything lies, once the last unit is
        finished.
        """
        self.reaches(1 << 62)
        return TokenStream, (self.shards, self.documents)

    def grow(self) -> None:
        """Take in the units that were finished since the last look."""
        with self._changing:
            if self._whole:
                return
            shards, whole = self._work.finished_shards()
            if len(shards) > len(self.shards) or whole:
                kept = self._open
                super().__init__(shards)
                self._open, self._whole = kept, whole

    def reaches(self, position: int) -> bool:
        """Are there `position` tokens? Waits until it is known."""
        while not self._whole and self.known_tokens < position:
            self.grow()
            if self._whole or self.known_tokens >= position:
                break
            self._work.keep_going()
            if self._impatient.wait(POLL_SECONDS):
                raise InputError(
                    f"{self._work.out}: reading ended before token {position:,} was there; start the run again to go on"
                )
        return self.known_tokens >= position

    @contextmanager
    def not_waiting(self) -> Iterator[None]:
        self._impatient.set()
        try:
            yield
        finally:
            self._impatient.clear()

    @property
    def known_tokens(self) -> int:
        return self._bounds[-1]

    @property
    def growing(self) -> bool:
        return not self._whole

    @property
    def tokens(self) -> int:
        """All tokens; waits until the last unit is finished."""
        self.reaches(1 << 62)
        return self.known_tokens

    @property
    def estimated_tokens(self) -> int:
        """All tokens if the rest is like what is there."""
        share = self._work.share_done()
        return self.known_tokens if self._whole or not share else int(self.known_tokens / share)

    @property
    def has_documents(self) -> bool:
        return True


class TextWork:
    """The plan of a text input, its finished units, and the process that works on the rest."""

    def __init__(self, options: PrepareOptions) -> None:
        self.options, self.out = options, Path(options.out)
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        self._deaths, self._units_at_death = 0, 0
        self._finished = 0
        self._shards: list[Shard] = []
        self._records: list[dict[str, Any]] = []
        plan = planning.open_plan(options, self.out)
        self.changed_input: str | None = None
        if plan is None:
            prepare.check_complete(options, self.out)
            self.changed_input = prepare.changed_input(options, self.out)
        else:
            (self.out / FAILURE).unlink(missing_ok=True)
        self.plan = plan or {}  # empty when nothing is left to do
        self._weights = planning.unit_weights(self.plan) if self.plan else []
        self._count = self._counted(0)

    @property
    def complete(self) -> bool:
        return (self.out / layout.MANIFEST).exists()

    def finished_shards(self) -> tuple[list[Shard], bool]:
        """(training shards of the units finished so far, in plan order and without a gap; whether these are all)."""
        if self.complete:
            return tokens.open_folder(self.out).train.shards, True
        dtype = tokens.dtype_for(self.plan["tokenizer"]["vocab_size"])
        while (
            self._finished < len(self.plan["units"]) and (path := encode.record_path(self.out, self._finished)).exists()
        ):
            try:
                record = files.read_json(path)
            except InputError:
                break  # removed this moment: the manifest is there now
            self._shards += [tokens.shard_of(self.out, entry, dtype) for entry in record["shards"]]
            self._records.append(record)
            self._count.add(self._finished, record)
            self._count.check()
            self._finished += 1
        return list(self._shards), False

    def check(self) -> None:
        """Go on with the work. Raises TextEnds where it failed, whether or not there is enough of it to train on."""
        if self.plan:
            self.keep_going()

    def check_read(self, position: int) -> None:
        """The run ends at token `position`. Raises TextEnds where too many rows are no documents of the units that were
        read; of a whole text `prepare` has asked that.
        """
        if not self.plan or self.complete:
            return
        ends = list(itertools.accumulate(record["tokens"] for record in self._records))
        self._counted(bisect.bisect_left(ends, position) + 1).check(alone=True)

    def account(self) -> str | None:
        """One line in which every row is somewhere; of the units that are finished, None where none is."""
        if self.complete:
            return messages.account(read_manifest(self.out))
        count = self._counted(len(self._records))
        found = {"rows": count.rows, "documents": count.kept, "drops": count.drops, "bad_files": []}
        return f"so far {messages.account({**found, 'held_out': {'share': 0, 'documents': 0}})}" if count.rows else None

    def _counted(self, units: int) -> prepare.DropCount:
        """The rows of the first so many units. Its check raises TextEnds."""
        count = prepare.DropCount(self.options.max_drop_fraction, self.out, self.plan, TextEnds)
        for number, record in enumerate(self._records[:units]):
            count.add(number, record)
        return count

    def share_done(self) -> float:
        return sum(self._weights[: self._finished]) / max(1, sum(self._weights)) if self.plan else 1.0

    def keep_going(self) -> None:
        """Start the work if nobody does it. Raises TextEnds with the reason when it failed."""
        with self._starting:
            if self.complete or self._works():
                return
            if (self.out / FAILURE).exists():
                raise TextEnds(files.read_json(self.out / FAILURE)["message"])
            try:
                with prepare.sole_writer(self.out, shared=False):
                    pass
            except InputError:
                return  # another rank's process, or one that outlives its trainer for a moment
            if self._deaths >= RESTARTS:
                raise TextEnds(
                    f"{self.out}: the tokenising process died {self._deaths} times at the same unit; `argonne prepare` "
                    "by itself will show why"
                )
            request = json.dumps(dataclasses.asdict(self.options), default=str)
            command = [sys.executable, "-m", "argonne.prepare.from_text", request, str(os.getpid())]
            # A session of its own: requests to the trainer's group are the trainer's, which may need more tokens.
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def _works(self) -> bool:
        """Does this rank's own process work? One that ended since the last look by itself (0) left the work to another
        rank's; else it died.
        """
        if self._process is None:
            return False
        code = self._process.poll()
        if code is None:
            return True
        self._process = None
        if code:
            units = len(list((self.out / layout.UNITS).glob("[0-9]*.json")))
            self._deaths = self._deaths + 1 if units == self._units_at_death else 1
            self._units_at_death = units
        return False

    def wait(self) -> None:
        """Until everything is tokenised."""
        while not self.complete:
            self.keep_going()
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """End this process's own background work; what it has finished stays. Raises TextEnds where it had failed."""
        if self._process is not None and self._process.poll() is None:
            if not self.complete:  # else it is tidying up
                self._process.terminate()
            self._process.wait()
        if self.plan and (self.out / FAILURE).exists():
            raise TextEnds(files.read_json(self.out / FAILURE)["message"])


def open_text(data: DataSection, run_folder: Path | None) -> tuple[TokenSet, TextWork]:
    """The token set of `data.input`, growing where rows can be read before it is complete: packed, sequential,
    `prefetch = "steps"`.
    """
    work = TextWork(options_of(data, run_folder))
    early = data.order == "sequential" and data.documents == "packed" and data.prefetch == "steps" and not data.hold_out
    if not early or work.complete:
        work.wait()
        opened = tokens.open_folder(work.out)
        return dataclasses.replace(
            opened, fingerprint=opened.manifest["plan"]
        ) if data.order == "sequential" else opened, work
    work.keep_going()
    stream = GrowingStream(work)
    stream.grow()  # what earlier sessions have left is checked like any shard
    return (
        TokenSet(
            path=work.out,
            format="text",
            dtype=tokens.dtype_for(work.plan["tokenizer"]["vocab_size"]),
            vocab_size=work.plan["tokenizer"]["vocab_size"],
            fingerprint=files.fingerprint(work.plan),
            train=stream,
            tokenizer_folder=work.out / layout.TOKENIZER,
            tokenizer_fingerprint=work.plan["tokenizer"]["fingerprint"],
            eos_id=work.plan["tokenizer"]["eos_id"],
        ),
        work,
    )


def work_in_background(request: str) -> None:
    """What the background process does: `prepare`, with a failure left for the trainer to read."""
    values: dict[str, Any] = json.loads(request)
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    values |= {name: Path(values[name]) for name in ("out", "tokenizer")}
    options = PrepareOptions(**{**values, "jobs": JobSettings(**values["jobs"])})
    try:
        prepare.prepare(options)
    except InUse:
        return
    except InputError as error:
        if not (options.out / layout.MANIFEST).exists():
            files.write_json(options.out / FAILURE, {"message": str(error)})


if __name__ == "__main__":
    engines.end_with(int(sys.argv[2]))
    os.nice(5)
    work_in_background(sys.argv[1])
