"""What the loop asks of data: pure functions of the step, and batches of this rank. Who reads and how is the data's own
affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from argonne.errors import InputError
from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import MicroBatch
from argonne.parallel.parallelise import Parallelised
from argonne.tokens.tokenizer import TextTokenizer


class ChatStops(Protocol):
    """What a trained chat model carries: its template for other people's tools, and where its answers end."""

    @property
    def jinja(self) -> str: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...


class Data(Protocol):
    """The data of one run. `step` counts optimizer steps from 0; rows and samples are those of the whole global batch.

    unit: what a loss is divided by ("tokens", "pairs", ...), the name of the array that holds each row's count.
    reads_model: reading needs the current weights, so that nothing is read ahead. document_mask: rows hold documents
    that do not see one another. chat: None for running text.
    """

    tokenizer: TextTokenizer
    tokenizer_folder: Path
    vocab_size: int
    unit: str
    reads_model: bool

    @property
    def document_mask(self) -> bool: ...
    @property
    def chat(self) -> ChatStops | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def source_names(self) -> list[str]: ...
    @property
    def description(self) -> list[str]: ...
    @property
    def tokens_per_epoch(self) -> int: ...
    def rows(self, step: int) -> int: ...
    def sequence_length(self, step: int) -> int: ...
    def samples_before(self, step: int) -> int: ...
    def tokens_before(self, step: int) -> int: ...
    def check_steps(self, steps: int) -> None: ...
    def passes(self, step: int) -> dict[str, float]: ...
    def tokens_by_source(self, step: int) -> dict[str, int]: ...
    def state(self, step: int) -> dict[str, Any]: ...
    def held_out(self, windows: int, rows: int) -> Iterator[MicroBatch]:
        """At most `windows` held-out rows in batches of at most `rows`, the same at each call; none where nothing is
        held out.
        """
        ...

    def attach(self, model: Parallelised, mesh: Mesh) -> None:
        """Once the model is on its mesh, before the first row is read: a reference pass, a sampler, checks in the
        background.
        """
        ...

    def close(self) -> None: ...


class Batch(Protocol):
    """One rank's part of the global batch of a step. Every rank has the same number of micro-batches; rows that fill up
    train nothing.

    count: what this rank's rows add to the divisor of the loss.
    """

    @property
    def step(self) -> int: ...
    @property
    def micro_batches(self) -> Sequence[MicroBatch]: ...
    @property
    def count(self) -> int: ...
    @property
    def waited_seconds(self) -> float: ...


@dataclass(frozen=True)
class Upcoming:
    """The batch of a step (None only at a request to stop), and what the ranks agreed on: the count that its loss is
    divided by, stopping, saving.
    """

    batch: Batch | None
    count: int
    stop: bool
    save: bool


class Batches(Protocol):
    """Step -> this rank's batch, cut into micro-batches of `micro_rows` rows."""

    micro_rows: int

    @property
    def reads_alone(self) -> bool:
        """Does no rank wait for another while this one reads?"""
        ...

    def set_micro_rows(self, rows: int) -> None: ...
    def batch(self, step: int) -> Batch: ...
    def wrong(self) -> InputError | None:
        """What was found wrong in the background, if anything was."""
        ...

    def close(self) -> None: ...
