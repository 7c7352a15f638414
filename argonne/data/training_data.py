"""The data of one run: opened sources, the phases of their order, and where a step's rows lie."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from argonne import files
from argonne.config import BatchSection, DataSection
from argonne.data import batches, phases
from argonne.data import mixture as mixtures
from argonne.data.mixture import Mixture
from argonne.data.sources import Source, open_sources, shared_tokenizer
from argonne.data.windows import SourceWindows
from argonne.errors import InputError
from argonne.prepare import from_text
from argonne.prepare.from_text import TextWork
from argonne.tokens.tokenizer import TextTokenizer
from argonne.tokens.verification import Verification

if TYPE_CHECKING:
    from argonne.data.loader import Loader


class TrainingData:
    """What `open_training_data` returns. Everything is a pure function of (sources, phases, step)."""

    def __init__(self, data: DataSection, sources: Sequence[Source], plan: Mixture, tokenizer: TextTokenizer) -> None:
        self.data, self.sources, self.mixture = data, list(sources), plan
        self.tokenizer = tokenizer
        self.tokenizer_folder, self.vocab_size, self.eos_id = tokenizer.folder, tokenizer.vocab_size, tokenizer.eos_id
        self.run_folder: Path | None = None
        self.work: TextWork | None = None
        self._verification: Verification | None = None
        self.streams = {source.tokens.fingerprint: source.tokens.train for source in sources}

    def __getstate__(self) -> dict[str, Any]:
        """For other ranks under `reader = "rank-0"`: everything but the background work. They need none of the files."""
        return {**self.__dict__, "work": None, "_verification": None}

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

    def document_mask(self, step: int) -> bool:
        return self.mixture.phase_at(step).document_mask

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
            "positions": {name: dataclasses.asdict(position) for name, position in self.mixture.positions(step).items()},
        }

    @property
    def description(self) -> list[str]:
        """Lines for the banner."""
        lines = []
        total = sum(mixtures.integer_weights([source.weight for source in self.sources]))
        for source, weight in zip(self.sources, mixtures.integer_weights([source.weight for source in self.sources]), strict=True):
            lines.append(
                f"{source.name}: {self._size(source)}, {100 * weight / total:.2f} % of the batch, at most {source.max_epochs:g} passes"
            )
        if self.work is not None:
            others = [pattern for pattern in self.data.input if pattern not in self.work.options.input]
            unused = f"; not used: {', '.join(others)}" if others else ""
            lines.append(f"  tokenised from {self.work.options.input[0]} into {self.work.out}{unused}")
        for phase in self.mixture.phases:
            lines.append(
                f"from step {phase.first_step}: {phase.rows} rows of {phase.sequence_length:,} tokens, {phase.order}, "
                f"documents {phase.documents}"
                f"{', document mask' if phase.document_mask else ''}"
            )
            if phase.documents != "packed":
                for source in self.sources:
                    short = self.mixture.windows[source.tokens.fingerprint].short_documents(phase.sequence_length)
                    lines.append(
                        f"  {source.name}: {short:,} of {source.tokens.documents:,} documents are too short for a row and are left out"
                    )
        return lines

    @staticmethod
    def _size(source: Source) -> str:
        if source.tokens.train.growing:
            return "tokens are still being made"
        documents = "" if source.tokens.documents is None else f", {source.tokens.documents:,} documents"
        held = f", {source.tokens.held_out.tokens:,} held out" if source.tokens.held_out.tokens else ""
        return f"{source.tokens.tokens:,} tokens{documents}{held}"

    @cached_property
    def _held_out(self) -> list[tuple[Source, int]]:
        return [
            (source, (source.tokens.held_out.tokens - 1) // self.data.sequence_length)
            for source in self.sources
            if source.tokens.held_out.tokens > self.data.sequence_length
        ]

    @property
    def held_out_windows(self) -> int:
        """Held-out windows there are, of `data.sequence_length` tokens."""
        return sum(count for _, count in self._held_out)

    def _held_out_rows(self, windows: int) -> np.ndarray:
        """(windows, T + 1) int64: evenly spread over the held-out tokens of all sources, the same at each call."""
        count = min(windows, self.held_out_windows)
        rows = np.zeros((count, self.data.sequence_length + 1), dtype=np.int64)
        for index, (source, number) in enumerate(self._held_out_places(count)):
            source.tokens.held_out.copy(number * self.data.sequence_length, rows[index])
        return rows

    def _held_out_places(self, count: int) -> Iterator[tuple[Source, int]]:
        """(source, window within it) of `count` held-out windows."""
        for index in range(count):
            number = index * self.held_out_windows // count
            for source, here in self._held_out:
                if number < here:
                    yield source, number
                    break
                number -= here

    def held_out_sources(self, windows: int) -> list[str]:
        """Name of the source of each row of `held_out_batches(windows, ...)`, in order."""
        return [source.name for source, _ in self._held_out_places(min(windows, self.held_out_windows))]

    def held_out_batches(self, windows: int, rows: int) -> Iterator[dict[str, Any]]:
        """At most `windows` held-out windows in batches of at most `rows`, as the model takes them; the same ones at each call."""
        found = self._held_out_rows(windows)
        for start in range(0, len(found), rows):
            part = found[start : start + rows]
            arrays = batches.Arrays(
                np.ascontiguousarray(part[:, :-1]), np.ascontiguousarray(part[:, 1:]), None, np.zeros(len(part), np.int64)
            )
            if self.data.document_mask:
                arrays.positions = np.zeros_like(arrays.inputs)
                for row in range(len(part)):
                    batches.mask_documents(np.nonzero(arrays.inputs[row] == self.eos_id)[0] + 1, arrays.labels[row], arrays.positions[row])
            yield batches.to_tensors(arrays)

    def verify(self) -> Verification | None:
        """Begin to check the shards' hashes as `data.verify` says (once; "before" returns when all are right). Raises InputError for a fault."""
        if self.data.verify != "off" and self._verification is None:
            shards = [
                shard for source in self.sources for stream in (source.tokens.train, source.tokens.held_out) for shard in stream.shards
            ]
            self._verification = Verification(shards, self.run_folder)
            if self.data.verify == "background":
                self._verification.start()
            else:
                self._verification.run()
        if self._verification is not None:
            self._verification.raise_problem()
        return self._verification

    def close(self) -> None:
        """End what goes on in the background for this process: hashing, and tokenising of `data.input`."""
        if self._verification is not None:
            self._verification.close()
        if self.work is not None:
            self.work.close()

    def loader(
        self, rank: int, world_size: int, micro_rows: int, *, prefetch: int = 2, pin_memory: bool = False, broadcast: Any = None
    ) -> Loader:
        """This rank's batches. `broadcast(tensor)` sends rank 0's tensor to all in place (needed with `data.reader = "rank-0"`)."""
        from argonne.data.loader import Loader

        return Loader(self, rank, world_size, micro_rows, prefetch=prefetch, pin_memory=pin_memory, broadcast=broadcast)


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

    Raises InputError for a source that cannot be read, that is of another tokenizer, too short for a row, or that contradicts `state`.
    """
    if not data.sources and not data.input:
        raise InputError("data.sources: empty; name a token set written by `argonne prepare`, or give data.input and data.tokenizer")
    work = None
    if data.input:
        opened_text, work = from_text.open_text(data, run_folder)
        sources = [Source("text", opened_text, "1", math.inf)]
    else:
        sources = open_sources(data)
    tokenizer = shared_tokenizer(data, sources)
    windows = {source.tokens.fingerprint: SourceWindows(source.name, source.tokens.fingerprint, source.tokens.train) for source in sources}
    laid = phases.lay_out(data, batch, seed, sources, windows, state, allow)
    limits = {source.tokens.fingerprint: source.max_epochs for source in sources if math.isfinite(source.max_epochs)}
    plan = Mixture(laid, windows, limits, phases.carried_positions(state))
    opened = TrainingData(data, sources, plan, tokenizer)
    opened.run_folder, opened.work = run_folder, work
    return opened
