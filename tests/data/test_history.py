"""Any history of a run: steps, stops, resumes and changes of weight, source, row length and batch, against a slow
account of what was read.

The account is kept here in plain sets of token positions and knows nothing of how the rows are found. Token p of a
source has the id p plus the source's offset, so that a row shows where it lies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from argonne.config import BatchChange, BatchSection, DataSection, SourceSection
from argonne.data.dataset import TrainingData, open_training_data
from argonne.data.loader import Loader

SLOTS = 3
OFFSET = 1000
LONGEST_ROW = 9
# (documents, shards): odd sizes, seams everywhere, a document of one token, shards of one document; two documents at
# least are long.
SHAPES = (
    ([50, 31, 20], 2),
    ([3, 11, 1, 40, 17, 8, 9, 10], 3),
    ([10, 10], 2),
    ([91, 1, 1, 13, 5, 12, 19, 2, 30, 7, 11], 5),
    ([200, 101], 1),
    ([12, 15, 13, 14, 11, 16, 10, 18], 4),
)


@dataclass(frozen=True)
class Segment:
    """A session: what the recipe says in it, how many of its steps are kept, and how it is laid out over ranks."""

    shares: tuple[tuple[int, str], ...]  # (slot, weight) in the recipe's order
    rows: int
    length: int
    scheduled: (
        int | None
    )  # the batch changes so many steps into the session, by `batch.steps`; None: at its start, by hand
    steps: int
    lost: int  # steps trained after the last checkpoint
    world: int
    micro: int
    prefetch: int
    block: int  # rows that are located at once


@dataclass(frozen=True)
class History:
    shapes: tuple[int, ...]
    order: str
    documents: str
    mask: bool
    seed: int
    segments: tuple[Segment, ...]


@st.composite
def histories(draw: st.DrawFn) -> History:
    documents = draw(st.sampled_from(["packed", "packed", "within", "first-window"]))
    count = draw(st.integers(2, 5))
    menu = draw(
        st.lists(st.integers(1, LONGEST_ROW), min_size=2, max_size=3)
    )  # few, so that a length comes back within an epoch
    lengths = draw(st.lists(st.sampled_from(menu), min_size=count, max_size=count))
    if documents != "packed":
        # Documents passed over while rows were longer are not looked at again in the epoch: only one direction has a
        # simple account.
        lengths = sorted(lengths, reverse=draw(st.booleans()))
    shares = st.lists(
        st.tuples(st.integers(0, SLOTS - 1), st.sampled_from(["1", "2", "0.3", "7", "0"])),
        min_size=1,
        max_size=SLOTS,
        unique_by=lambda s: s[0],
    ).filter(lambda found: any(weight != "0" for _, weight in found))
    segments: list[Segment] = []
    for length in lengths:
        kept = len(segments) > 0 and draw(st.booleans())
        segments.append(
            Segment(
                shares=segments[-1].shares if kept else tuple(draw(shares)),
                rows=segments[-1].rows if len(segments) > 0 and draw(st.booleans()) else draw(st.integers(1, 5)),
                length=segments[-1].length if kept and documents == "packed" and draw(st.booleans()) else length,
                scheduled=draw(st.none() | st.integers(0, 3)) if segments else None,
                steps=draw(st.integers(0, 6)),
                lost=draw(st.integers(0, 2)),
                world=draw(st.integers(1, 3)),
                micro=draw(st.integers(1, 4)),
                prefetch=draw(st.integers(0, 2)),
                block=draw(st.sampled_from([3, 16, 50])),
            )
        )
    order = draw(st.sampled_from(["sequential", "shuffled"]))
    shapes = tuple(draw(st.lists(st.integers(0, len(SHAPES) - 1), min_size=SLOTS, max_size=SLOTS)))
    return History(shapes, order, documents, draw(st.booleans()), draw(st.integers(0, 99)), tuple(segments))


@dataclass
class Row:
    """One row as the model gets it. `places` are the positions of its inputs in its source."""

    slot: int
    places: list[int]
    labels: list[int]
    positions: list[int] | None


@dataclass
class Account:
    """What of one source is still unread in the epoch underway; positions of targets (packed) or
    numbers of documents.
    """

    lengths: list[int]
    history: History
    unread: set[int] = field(default_factory=set)
    epochs: int = 0

    def __post_init__(self) -> None:
        self.ends = [sum(self.lengths[: number + 1]) for number in range(len(self.lengths))]

    def take(self, row: Row, length: int) -> None:
        """Book a row; it must be of the epoch underway while one can be made of that, and it may hold nothing that was
        read in it.
        """
        packed = self.history.documents == "packed"
        possible = self.unread if packed else {number for number in self.unread if self.lengths[number] > length}
        if len(possible) < (length if packed else 1):
            self.unread = possible = self._whole_epoch(length)
            self.epochs += 1
        items = {place + 1 for place in row.places} if packed else {self._document(row.places)}
        assert len(items) == (length if packed else 1)
        assert items <= self.unread, f"read twice in epoch {self.epochs}: {sorted(items - self.unread)}"
        if self.history.order == "sequential":
            assert sorted(items) == sorted(possible)[: len(items)], "skipped"
        self.unread -= items

    def _whole_epoch(self, length: int) -> set[int]:
        if self.history.documents != "packed":
            return {number for number, size in enumerate(self.lengths) if size > length}
        targets = self.ends[-1] - 1
        return set(range(1, 1 + (targets if self.history.order == "sequential" else targets // length * length)))

    def _document(self, places: Sequence[int]) -> int:
        """The document that the row lies in, targets included."""
        number = sum(end <= places[0] for end in self.ends)
        begin = self.ends[number] - self.lengths[number]
        assert places == list(range(places[0], places[0] + len(places)))
        assert places[-1] + 1 < self.ends[number], "the last target lies in the next document"
        assert self.history.documents != "first-window" or places[0] == begin
        return number

    def check_targets(self, row: Row) -> None:
        """Each target is the true next token; with a document mask none crosses a document, and positions begin again
        with each.
        """
        last = {end - 1 for end in self.ends} if self.history.mask else set()
        offset = OFFSET * row.slot
        assert row.labels == [-100 if place in last else place + 1 + offset for place in row.places]
        if self.history.mask:
            expected, position = [], 0
            for place in row.places:
                expected.append(position)
                position = 0 if place in last else position + 1
            assert row.positions == expected


class Run:
    """A run's recipe as its user edits it."""

    def __init__(self, history: History, write_tokens: Callable[..., Path]) -> None:
        self.history, self.write_tokens = history, write_tokens
        self.changes: list[BatchChange] = []
        self.base: tuple[int, int] | None = None
        self.state: dict[str, Any] | None = None
        self.step = 0

    def path(self, slot: int) -> Path:
        shape = self.history.shapes[slot]
        lengths, shards = SHAPES[shape]
        return self.write_tokens(f"slot-{slot}-{shape}", lengths, shards=shards, offset=OFFSET * slot)

    def open(self, segment: Segment) -> TrainingData:
        """Edit the recipe to what the segment asks for and open its data, as a resume does."""
        if self.base is None:
            self.base = (segment.rows, segment.length)
        elif self.changes or segment.scheduled is not None:
            at = self.step + (segment.scheduled or 0)
            self.changes = [change for change in self.changes if change.step < at]
            self.changes.append(
                BatchChange(step=at, tokens_per_step=segment.rows * segment.length, sequence_length=segment.length)
            )
        else:
            self.base = (segment.rows, segment.length)
        rows, length = self.base
        sources = tuple(
            SourceSection(path=str(self.path(slot)), weight=float(weight), max_epochs=1e6)
            for slot, weight in segment.shares
        )
        data = DataSection(
            sources=sources,
            sequence_length=length,
            order=self.history.order,
            documents=self.history.documents,
            document_mask=self.history.mask,
            verify="off",
        )
        batch = BatchSection(tokens_per_step=rows * length, steps=tuple(self.changes))
        state = None if self.state is None else json.loads(json.dumps(self.state))
        return open_training_data(data, batch, self.history.seed, state=state)

    def batch_at(self, step: int) -> tuple[int, int]:
        """(rows, length) that the recipe asks for."""
        assert self.base is not None
        found = self.base
        for change in self.changes:
            if change.step <= step:
                assert change.tokens_per_step is not None
                assert change.sequence_length is not None
                found = (change.tokens_per_step // change.sequence_length, change.sequence_length)
        return found


def read(data: TrainingData, segment: Segment, steps: range) -> list[list[Row]]:
    """The rows of each step in global order, put together from all ranks."""
    readers = [
        Loader(data, rank, segment.world, segment.micro, prefetch=segment.prefetch) for rank in range(segment.world)
    ]
    found = []
    for step in steps:
        rows = []
        for reader in readers:
            batch = reader.batch(step)
            for micro in batch.micro_batches:
                sources = micro["source"]
                parts = [micro["input_ids"].tolist(), micro["shift_labels"].tolist()]
                positions = micro["position_ids"].tolist() if "position_ids" in micro else [None] * len(sources)
                for inputs, labels, position, source in zip(*parts, positions, sources.tolist(), strict=True):
                    if source < 0:
                        assert set(labels) == {-100}
                    else:
                        slot = segment.shares[source][0]
                        rows.append(Row(slot, [token - OFFSET * slot for token in inputs], labels, position))
        found.append(rows)
    for reader in readers:
        reader.close()
    return found


def check_quotas(shares: Sequence[tuple[int, str]], drawn: Sequence[int]) -> None:
    """After each row of a phase every source is within two rows of its share, and has it exactly where it is a whole
    number for all.
    """
    weights = {slot: int(10 * float(weight)) for slot, weight in shares}
    whole = sum(weights.values())
    had = dict.fromkeys(weights, 0)
    for count, slot in enumerate(drawn, 1):
        had[slot] += 1
        errors = [had[slot] * whole - count * weight for slot, weight in weights.items()]
        assert max(map(abs, errors)) <= 2 * whole
        assert any(count * weight % whole for weight in weights.values()) or not any(errors)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(history=histories())
def test_no_history_of_stops_and_changes_repeats_or_skips_a_token(
    write_tokens: Callable[..., Path], history: History
) -> None:
    live_through(history, write_tokens)


@pytest.mark.campaign
@settings(max_examples=5_000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(history=histories())
def test_thousands_of_histories_neither_repeat_nor_skip_a_token(
    write_tokens: Callable[..., Path], history: History
) -> None:
    live_through(history, write_tokens)


def live_through(history: History, write_tokens: Callable[..., Path]) -> None:
    run = Run(history, write_tokens)
    accounts = [Account(SHAPES[shape][0], history) for shape in history.shapes]
    phase: Any = None
    drawn: list[int] = []
    quota_of = history.segments[0].shares
    samples = tokens = 0
    for segment in history.segments:
        data = run.open(segment)
        kept = range(run.step, run.step + segment.steps)
        with mock.patch.object(TrainingData, "block", segment.block):
            found = read(data, segment, range(kept.start, kept.stop + segment.lost))
        for step, rows in zip(kept, found[: len(kept)], strict=True):
            count, length = run.batch_at(step)
            if phase != (phase := (segment.shares, count, length)):
                check_quotas(quota_of, drawn)
                drawn, quota_of = [], segment.shares
            assert len(rows) == count
            for row in rows:
                accounts[row.slot].take(row, length)
                accounts[row.slot].check_targets(row)
            drawn += [row.slot for row in rows]
            samples, tokens = samples + count, tokens + count * length
        run.step = kept.stop
        run.state = data.state(run.step)
        assert (run.state["samples"], run.state["tokens"]) == (samples, tokens)
    check_quotas(quota_of, drawn)
