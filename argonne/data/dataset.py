"""The data of one run: opened sources, the phases of their order, and where a step's rows lie."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from argonne import files
from argonne.config import BatchSection, DataSection
from argonne.data import mixture as mixtures
from argonne.data import phases
from argonne.data.chat import ChatTemplate
from argonne.data.loader import Array, Exchange
from argonne.data.mixture import GlobalRows, Mixture, Phase
from argonne.data.phases import Source, open_sources, shared_tokenizer
from argonne.data.windows import IGNORED, SourceWindows, ends_in_row, mask_documents
from argonne.errors import InputError
from argonne.prepare import from_text
from argonne.prepare.from_text import TextWork
from argonne.tokens.inspection import Verification
from argonne.tokens.shards import TokenStream
from argonne.tokens.tokenizer import TextTokenizer

FILLER_SOURCE = -1


class TrainingData:
    """Windows of tokens. What `open_training_data` returns; everything is a pure function of (sources,
    phases, step).
    """

    unit = "tokens"
    reads_model = False
    chat: ChatTemplate | None = None
    # Rows located at once: the arithmetic is vectorised, and one row at a time would cost as much as reading it.
    block = 4096

    def __init__(
        self, data: DataSection, sources: Sequence[Source], mixture: Mixture, tokenizer: TextTokenizer
    ) -> None:
        self.data, self.sources, self.mixture = data, list(sources), mixture
        self.tokenizer = tokenizer
        self.tokenizer_folder, self.vocab_size, self.eos_id = tokenizer.folder, tokenizer.vocab_size, tokenizer.eos_id
        self.run_folder: Path | None = None
        self.work: TextWork | None = None
        self._verification: Verification | None = None
        self._tells, self._last_step = False, -1  # which ranks speak, and where the run ends
        self._streams = [source.tokens.train for source in sources]
        # What ends documents in each source, where it keeps no ends.
        opened = [source.tokens for source in sources]
        ends = [one.eos_id if one.train.has_documents else phases.end_of(one, tokenizer) for one in opened]
        self._ends = [self.eos_id if end is None else end for end in ends]
        self._blocks: dict[tuple[int, int], GlobalRows] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For other ranks under `reader = "rank-0"`: everything but the background work. They need
        none of the files.
        """
        return {**self.__dict__, "work": None, "_verification": None}

    @property
    def document_mask(self) -> bool:
        return self.data.document_mask

    @property
    def source_names(self) -> list[str]:
        """Names in the order of `data.sources`; `Batch.sources` holds indices into this list."""
        return [source.name for source in self.sources]

    @cached_property
    def fingerprint(self) -> str:
        """What is read, whatever the order: the fingerprints of the sources."""
        return files.fingerprint(sorted(source.tokens.fingerprint for source in self.sources))

    def rows(self, step: int) -> int:
        """Rows of the global batch of `step`."""
        return self.mixture.phase_at(step).rows

    def sequence_length(self, step: int) -> int:
        return self.mixture.phase_at(step).sequence_length

    def samples_before(self, step: int) -> int:
        """Global rows drawn before `step`."""
        return self.mixture.samples_before(step)

    def tokens_before(self, step: int) -> int:
        """Tokens trained on before `step` (rows x length, over all ranks)."""
        return self.mixture.tokens_before(step)

    @cached_property
    def tokens_per_epoch(self) -> int:
        """Tokens that the mixture can give before one source has been read once."""
        return self.mixture.rows_available() * self.mixture.phases[0].sequence_length

    def check_steps(self, steps: int) -> None:
        """Raise InputError when `steps` steps would read a source more often than its `max_epochs`."""
        self._last_step = steps - 1
        self.mixture.check_steps(steps)

    def passes(self, step: int) -> dict[str, float]:
        """Passes over each source before `step`, by source name."""
        found = self.mixture.passes(step)
        return {source.name: found.get(source.tokens.fingerprint, 0.0) for source in self.sources}

    def tokens_by_source(self, step: int) -> dict[str, int]:
        """Tokens that each source has given before `step`, by source name."""
        found = self.mixture.draws(step)
        return {source.name: found.get(source.tokens.fingerprint, (0, 0))[1] for source in self.sources}

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint stores: counts and phases, never buffers. JSON."""
        used = [phase for phase in self.mixture.phases if phase.first_step < max(step, 1)]
        return {
            "format_version": phases.STATE_VERSION,
            "step": step,
            "samples": self.samples_before(step),
            "tokens": self.tokens_before(step),
            "fingerprint": self.fingerprint,
            "phases": [dataclasses.asdict(phase) for phase in used],
            "positions": {
                name: dataclasses.asdict(position) for name, position in self.mixture.positions(step).items()
            },
        }

    @property
    def description(self) -> list[str]:
        """Lines for the banner."""
        weights = mixtures.integer_weights([source.weight for source in self.sources])
        lines = [
            f"{source.name}: {_size(source)}, {100 * weight / sum(weights):.2f} % of the batch, at most "
            f"{source.max_epochs:g} passes"
            for source, weight in zip(self.sources, weights, strict=True)
        ]
        if self.work is not None:
            others = [pattern for pattern in self.data.input if pattern not in self.work.options.input]
            unused = f"; not used: {', '.join(others)}" if others else ""
            lines.append(f"  tokenised from {self.work.options.input[0]} into {self.work.out}{unused}")
            if self.work.changed_input:
                lines.append(f"  warning: {self.work.changed_input}: the run goes on with what it began with")
            lines.append(f"  {self.tokenizer.end_told}")
            lines += [f"  {account}"] if (account := self.work.account()) else []
        for phase in self.mixture.phases:
            mask = ", document mask" if phase.document_mask else ""
            rows = (
                f"{phase.rows} rows of {phase.sequence_length:,} tokens, {phase.order}, documents "
                f"{phase.documents}{mask}"
            )
            lines.append(f"from step {phase.first_step}: {rows}")
            for source in self.sources if phase.documents != "packed" else ():
                windows = self.mixture.windows[source.tokens.fingerprint]
                assert isinstance(windows, SourceWindows)
                short = windows.short_documents(phase.sequence_length)
                of = f"{short:,} of {source.tokens.documents:,} documents"
                lines.append(f"  {source.name}: {of} are too short for a row and are left out")
        return lines

    def held_out(self, windows: int, rows: int) -> Iterator[Mapping[str, torch.Tensor]]:
        """At most `windows` held-out windows in batches of at most `rows`, under the names of a training batch.

        They are evenly spread over the held-out tokens of all sources, the same ones at each call, none where nothing
        is held out; they touch neither order nor state.
        """
        length, streams = self.data.sequence_length, [source.tokens.held_out for source in self.sources]
        bounds = np.cumsum([0, *(max(0, (stream.tokens - 1) // length) for stream in streams)])
        count = min(windows, int(bounds[-1]))
        windows_taken = np.arange(count) * bounds[-1] // max(count, 1)
        for start in range(0, count, rows):
            taken = windows_taken[start : start + rows]
            sources = np.searchsorted(bounds, taken, side="right") - 1
            tokens = np.zeros((len(taken), length + 1), dtype=np.int64)
            for row, source, number in zip(tokens, sources.tolist(), (taken - bounds[sources]).tolist(), strict=True):
                streams[source].copy(number * length, row)
            inputs, labels = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
            arrays = {"input_ids": inputs, "shift_labels": labels, "source": sources}
            if self.data.document_mask:
                arrays["position_ids"] = np.zeros_like(inputs)
                for line, source in enumerate(sources.tolist()):
                    found = np.nonzero(inputs[line] == self._ends[source])[0] + 1
                    mask_documents(found, labels[line], arrays["position_ids"][line])
            arrays["tokens"] = (labels >= 0).sum(axis=1)
            yield {name: torch.from_numpy(array) for name, array in arrays.items()}

    def verify(self) -> Verification | None:
        """Begin to check the shards' hashes as `data.verify` says (once; "before" returns when all are right). Raises
        InputError for a fault.
        """
        if self.data.verify != "off" and self._verification is None:
            shards = [
                shard
                for source in self.sources
                for stream in (source.tokens.train, source.tokens.held_out)
                for shard in stream.shards
            ]
            self._verification = Verification(shards, self.run_folder)
            if self.data.verify == "background":
                self._verification.start()
            else:
                self._verification.run()
        self.check()
        return self._verification

    def attach(self, model: object, mesh: Exchange) -> None:
        """The run begins: rank 0 begins to check the shards' hashes."""
        self._tells = mesh.is_main
        if mesh.is_main:
            self.verify()

    def check(self) -> None:
        """Raise InputError when the check of the hashes found a fault so far, TextEnds when the tokenising failed."""
        if self._verification is not None and self._verification.problem is not None:
            raise InputError(self._verification.problem)
        if self.work is not None:
            self.work.check()

    @contextmanager
    def not_waiting(self) -> Iterator[None]:
        """Inside, whoever waits for tokens that are still being made gets an InputError instead."""
        with ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(stream.not_waiting())
            yield

    def close(self) -> None:
        """End what goes on in the background for this process: hashing, and tokenising of `data.input`. Raises what was
        found wrong there.
        """
        work, self.work = self.work, None
        if self._verification is not None:
            self._verification.close()
        if work is not None:
            if self._tells and (account := work.account()):
                print(f"{work.out}: {account}", file=sys.stderr, flush=True)
            work.close()
        self.check()

    def read(self, step: int, first: int, count: int, rows: int) -> dict[str, Array]:
        """Rows first .. first + count - 1 of the global batch of `step`, filled up to `rows` with rows that train
        nothing.

        input_ids, shift_labels (rows, T) int64; with a document mask position_ids, which restart with each document;
        source (rows,), -1 where a row fills up; tokens (rows,), the targets that are trained on. Raises InputError
        where a source is used up.
        """
        phase = self.mixture.phase_at(step)
        sample = self.mixture.samples_before(step) + first
        self.mixture.check_rows(phase, self.mixture.samples_before(step) + phase.rows)
        length = phase.sequence_length
        inputs, labels = np.empty((rows, length), np.int64), np.empty((rows, length), np.int64)
        positions = np.empty((rows, length), np.int64) if phase.document_mask else None
        sources = np.full(rows, FILLER_SOURCE, np.int64)
        located = self._located(phase, sample, count)
        for row, (source, runs) in enumerate(located):
            sources[row], stream, filled = source, self._streams[source], 0
            for begin, size in runs:
                stream.copy_shifted(begin, inputs[row, filled : filled + size], labels[row, filled : filled + size])
                filled += size
        for part in (inputs[:count], labels[:count]):
            ids = part.view(np.uint64)  # of a negative one that is far past the vocabulary
            if ids.max(initial=0) >= self.vocab_size:
                outside = int((ids >= self.vocab_size).argmax())
                source, runs = located[outside // length]
                raise self._outside(self._streams[source], runs, int(part.flat[outside]))
        if positions is not None:
            for row, (source, runs) in enumerate(located):
                ends = ends_in_row(self._streams[source], runs, inputs[row], self._ends[source])
                mask_documents(ends, labels[row], positions[row])
        if step == self._last_step and self.work is not None:
            self.work.check_read(max((begin + size for _, runs in located for begin, size in runs), default=0))
        inputs[count:], labels[count:] = 0, IGNORED
        tokens = np.zeros(rows, np.int64)
        tokens[:count] = length if positions is None else np.count_nonzero(labels[:count] != IGNORED, axis=1)
        arrays = {"input_ids": Array(inputs, 0), "shift_labels": Array(labels, IGNORED), "tokens": Array(tokens, 0)}
        arrays["source"] = Array(sources, FILLER_SOURCE)
        if positions is not None:
            whole_row = np.arange(length)
            positions[count:] = whole_row
            arrays["position_ids"] = Array(positions, whole_row)
        return arrays

    def _outside(self, stream: TokenStream, runs: Sequence[tuple[int, int]], found: int) -> InputError:
        """Says where in a row the id `found` lies, which the model has no row for."""
        for begin, size in runs:
            ids = np.empty(size + 1, np.int64)
            stream.copy(begin, ids)
            if (ids == found).any():
                path, place = stream.place(begin + int((ids == found).argmax()))
                break
        return InputError(
            f"{path}: holds id {found:,}, the tokenizer {self.tokenizer_folder} has {self.vocab_size:,} entries; set "
            f"data.tokenizer to the one that made these tokens (it is token {place:,} of the file)"
        )

    def _located(self, phase: Phase, first: int, count: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """(number of the source in the recipe, runs of its tokens) of each row, out of blocks of rows that are located
        once.
        """
        growing = any(stream.growing for stream in self._streams)
        found: list[tuple[int, list[tuple[int, int]]]] = []
        while count:
            number, inside = divmod(first - phase.first_sample, self.block)
            here = count if growing else min(count, self.block - inside)
            # Nothing of a text that is still being tokenised is located before it is asked for: it would be waited for.
            block, inside = (
                (self._locate(phase, first, first + count), 0) if growing else (self._block(phase, number), inside)
            )
            sources, starts = (part[inside : inside + here].tolist() for part in (block.source, block.rows.start))
            for place, (source, start) in enumerate(zip(sources, starts, strict=True), inside):
                found.append((source, [(start, phase.sequence_length)] if start >= 0 else block.rows.runs[place]))
            first, count = first + here, count - here
        return found

    def _block(self, phase: Phase, number: int) -> GlobalRows:
        """Two threads may locate the same block: both find the same, and the last three are kept."""
        key = (phase.first_step, number)
        found = self._blocks.get(key)
        if found is None:
            begin = phase.first_sample + number * self.block
            found = self._locate(phase, begin, begin + self.block)
            self._blocks = {**dict(list(self._blocks.items())[-2:]), key: found}
        return found

    def _locate(self, phase: Phase, start: int, stop: int) -> GlobalRows:
        found = self.mixture.locate(phase, start, stop)
        places = {source.tokens.fingerprint: number for number, source in enumerate(self.sources)}
        numbers = np.array([places[source.fingerprint] for source in phase.sources])
        return GlobalRows(numbers[found.source], found.rows, found.epoch)


def _size(source: Source) -> str:
    if source.tokens.train.growing:
        return "tokens are still being made"
    documents = "" if source.tokens.documents is None else f", {source.tokens.documents:,} documents"
    held = f", {source.tokens.held_out.tokens:,} held out" if source.tokens.held_out.tokens else ""
    return f"{source.tokens.tokens:,} tokens{documents}{held}"


def open_training_data(
    data: DataSection,
    batch: BatchSection,
    seed: int,
    *,
    state: dict[str, Any] | None = None,
    run_folder: Path | None = None,
    allow: frozenset[str] = frozenset(),
) -> TrainingData:
    """Open the sources of `data` and lay out the phases: those of `state` as they were, then what the recipe says now.

    Raises InputError for a source that cannot be read, that is of another tokenizer, too short for a row, or that
    contradicts `state`.
    """
    if not data.sources and not data.input:
        raise InputError(
            "data.sources: empty; name a token set written by `argonne prepare`, or give data.input and data.tokenizer"
        )
    work = None
    if data.input:
        opened_text, work = from_text.open_text(data, run_folder)
        sources = [Source("text", opened_text, "1", math.inf)]
    else:
        sources = open_sources(data)
    tokenizer = shared_tokenizer(data, sources)
    windows = {
        source.tokens.fingerprint: SourceWindows(source.name, source.tokens.fingerprint, source.tokens.train)
        for source in sources
    }
    laid = phases.lay_out(data, batch, seed, sources, windows, state, allow)
    limits = {source.tokens.fingerprint: source.max_epochs for source in sources if math.isfinite(source.max_epochs)}
    mixture = Mixture(laid, windows, limits, phases.carried_positions(state))
    opened = TrainingData(data, sources, mixture, tokenizer)
    opened.run_folder, opened.work = run_folder, work
    return opened
