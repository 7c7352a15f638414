"""Conversations as the data of a run: rendered, packed, mixed; every step a pure function, as with windows of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from argonne.config import BatchSection, DataSection, SourceSection
from argonne.data import mixture as mixtures
from argonne.data import phases
from argonne.data.chat import ChatTemplate
from argonne.data.dataset import FILLER_SOURCE, TrainingData
from argonne.data.loader import Array
from argonne.data.mixture import Mixture
from argonne.data.packing import PackedRows
from argonne.data.phases import Source
from argonne.data.rendered import TRAINED, RenderedSet, RenderOptions, render_files
from argonne.data.windows import IGNORED, Position, RowKey
from argonne.errors import InputError
from argonne.tokens.shards import TokenSet
from argonne.tokens.tokenizer import TextTokenizer

IDS = ~TRAINED
SAMPLE_TOKENS = 400


class ConversationData(TrainingData):
    """Rows of packed conversations. What `open_conversations` returns."""

    chat: ChatTemplate

    block = 64  # of a small source 4,096 rows are hundreds of epochs, and each would be packed
    together = 1  # conversations that lie in one row side by side: an item of the packing

    def __init__(
        self,
        data: DataSection,
        sources: Sequence[Source],
        mixture: Mixture,
        template: ChatTemplate,
        rendered: Sequence[RenderedSet],
    ) -> None:
        super().__init__(data, sources, mixture, template.tokenizer)
        self.chat, self.rendered = template, list(rendered)
        self._held_out = [
            PackedRows(source.name, source.tokens.fingerprint, self.items_of(one, "held_out"))
            for source, one in zip(sources, rendered, strict=True)
        ]

    @classmethod
    def items_of(cls, rendered: RenderedSet, side: str) -> np.ndarray:
        """(items,) positions in a stream just after each item."""
        return rendered.ends[side][cls.together - 1 :: cls.together]

    @property
    def description(self) -> list[str]:
        """Lines for the banner: what was read, used and dropped, how full the rows are, what is trained."""
        weights = mixtures.integer_weights([source.weight for source in self.sources])
        phase = self.mixture.phases[-1]
        lines = []
        for source, one, weight in zip(self.sources, self.rendered, weights, strict=True):
            account = one.account
            rows = self.mixture.windows[source.tokens.fingerprint].rows_left(phase.key, Position())
            dropped = sum(account.drops.values())
            held = f" ({account.held_out:,} of them held out)" if account.held_out else ""
            lines += [
                f"{source.name}: {account.rows:,} rows = {account.used:,} used{held} + {dropped:,} dropped; "
                f"{100 * weight / sum(weights):.2f} % of the batch, at most {source.max_epochs:g} passes",
                f"  {account.tokens:,} tokens, {account.trained_tokens:,} of them trained, in {rows:,} rows of "
                f"{phase.sequence_length:,}, {100 * account.tokens / (rows * phase.sequence_length):.2f} % full",
            ]
            lines += [f"  dropped: {account.dropped()}"] if account.drops else []
            lines += [f"  {count:,} {what}" for what, count in sorted(account.notes.items())]
        chat, end = self.chat, self.tokenizer.decode([self.chat.turn_end_id])
        lines.append(
            f"template {chat.template}, traces of earlier turns: {chat.history_reasoning}, turns end with {end} "
            f"({chat.turn_end_id}), which is trained"
        )
        return [*lines, "the first conversation; what is trained stands between « and »:", self.sample()]

    def sample(self) -> str:
        """The first conversation as it is trained: what is a target stands between « and »."""
        stop = min(int(self.items_of(self.rendered[0], "train")[0]), SAMPLE_TOKENS)
        marked = np.empty(stop, np.uint32)
        self._streams[0].copy(0, marked)
        edges = np.flatnonzero(np.diff(marked & TRAINED, prepend=np.uint32(0))).tolist()
        text = ""
        for begin, end in zip([0, *edges], [*edges, stop], strict=True):
            part = self.tokenizer.decode(marked[begin:end] & IDS)
            text += f"«{part}»" if begin < end and marked[begin] & TRAINED else part
        return text + ("" if stop < SAMPLE_TOKENS else " ...")

    def read(self, step: int, first: int, count: int, rows: int) -> dict[str, Array]:
        """Rows first .. first + count - 1 of the global batch of `step`, filled up to `rows` with rows that train
        nothing.

        input_ids, shift_labels, position_ids (rows, T) int64: labels are -100 where nothing is trained, positions
        restart with each conversation and with the padding behind them; source (rows,), -1 where a row fills up; tokens
        (rows,), the targets that are trained on. Raises InputError where a source is used up.
        """
        phase = self.mixture.phase_at(step)
        before = self.mixture.samples_before(step)
        self.mixture.check_rows(phase, before + phase.rows)
        located = self._located(phase, before + first, count)
        arrays = self._rows(located, "train", rows, phase.sequence_length)
        sources = np.full(rows, FILLER_SOURCE, np.int64)
        sources[:count] = [source for source, _ in located]
        fills: dict[str, int | np.ndarray] = {
            "position_ids": np.arange(phase.sequence_length),
            "shift_labels": IGNORED,
            "source": FILLER_SOURCE,
        }
        return {name: Array(array, fills.get(name, 0)) for name, array in {**arrays, "source": sources}.items()}

    def held_out(self, windows: int, rows: int) -> Iterator[Mapping[str, torch.Tensor]]:
        """At most `windows` rows of held-out conversations in batches of at most `rows`, under the names of a training
        batch.

        They are evenly spread over the rows of all sources, the same ones at each call, none where nothing is held out;
        they touch neither order nor state.
        """
        key = RowKey(self.data.sequence_length, "shuffled", "packed", 0)
        bounds = np.cumsum([0, *(packed.epoch_rows(key, 0) for packed in self._held_out)])
        count = min(windows, int(bounds[-1]))
        taken = np.arange(count) * bounds[-1] // max(count, 1)
        for start in range(0, count, rows):
            numbers = taken[start : start + rows]
            sources = np.searchsorted(bounds, numbers, side="right") - 1
            located = []
            for source, number in zip(sources.tolist(), (numbers - bounds[sources]).tolist(), strict=True):
                found, _ = self._held_out[source].locate(key, Position(), np.array([number]))
                located.append((source, found.runs[0]))
            arrays = {**self._rows(located, "held_out", len(numbers), key.sequence_length), "source": sources}
            yield {name: torch.from_numpy(array) for name, array in arrays.items()}

    def held_out_prompts(self, count: int, longest: int) -> list[list[int]]:
        """What stands before the first answer of the first held-out items, in ids: at most `count` of all sources in
        turn, none longer than `longest` tokens.
        """
        found: list[list[int]] = []
        bounds = [np.concatenate([[0], self.items_of(one, "held_out")]) for one in self.rendered]
        for number in range(max(map(len, bounds)) - 1):
            for one, ends in zip(self.rendered, bounds, strict=True):
                if number + 1 >= len(ends) or len(found) == count:
                    continue
                marked = np.empty(int(ends[number + 1] - ends[number]), np.uint32)
                one.held_out.copy(int(ends[number]), marked)
                prompt = marked[: np.flatnonzero(marked & TRAINED)[0]] & IDS
                if 0 < len(prompt) <= longest:
                    found.append(prompt.tolist())
        return found

    def _rows(
        self, located: Sequence[tuple[int, list[tuple[int, int]]]], side: str, rows: int, length: int
    ) -> dict[str, np.ndarray]:
        """The arrays of rows, each of one source and made of runs of its stream, an item each, filled up to `rows`."""
        inputs = np.full((rows, length), self.tokenizer.pad_id or 0, np.int64)
        labels = np.full((rows, length), IGNORED, np.int64)
        positions = np.tile(np.arange(length), (rows, 1))
        for row, (source, runs) in enumerate(located):
            filled, one = 0, self.rendered[source]
            stream = one.train if side == "train" else one.held_out
            for begin, size in self._conversations(one.ends[side], runs):
                marked, end = np.empty(size, np.uint32), filled + size
                stream.copy(begin, marked)
                inputs[row, filled:end] = marked & IDS
                targets = marked[1:]
                labels[row, filled : end - 1] = np.where(targets & TRAINED, (targets & IDS).astype(np.int64), IGNORED)
                positions[row, filled:end] = np.arange(size)
                filled = end
            positions[row, filled:] = np.arange(length - filled)
        inputs[len(located) :] = 0
        tokens = np.count_nonzero(labels != IGNORED, axis=1)
        return {"input_ids": inputs, "shift_labels": labels, "position_ids": positions, "tokens": tokens}

    def _conversations(self, ends: np.ndarray, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """(first token, tokens) of each conversation of a row's items."""
        return runs


Opened = TypeVar("Opened", bound=ConversationData)


def open_conversations(
    sources: Sequence[SourceSection],
    kind: type[Opened] = ConversationData,  # type: ignore[assignment] # what it is, where nothing is said
    *,
    tokenizer: TextTokenizer,
    template: str = "chatml",
    loss_on: str = "assistant",
    history_reasoning: str = "drop",
    too_long: str = "drop",
    reasoning_required: bool = False,
    sequence_length: int,
    hold_out: float = 0.0,
    max_drop_fraction: float = 1.0,
    cache: Path,
    batch: BatchSection,
    seed: int,
    state: dict[str, Any] | None = None,
    allow: frozenset[str] = frozenset(),
) -> Opened:
    """Render and pack the conversations of the sources (files, folders, globs), or the pairs of them that `kind` reads,
    and lay out the phases: those of `state` as they were, then what the recipe says now.

    Raises InputError for a source that cannot be read, of which nothing or too little can be trained on, or that
    contradicts `state`.
    """
    if not sources:
        raise InputError("data.sources: empty; name files of conversations (.jsonl, .parquet, .arrow)")
    chat = ChatTemplate(tokenizer, template, history_reasoning)
    pairs = kind.together > 1
    options = RenderOptions(sequence_length, loss_on, too_long, reasoning_required, hold_out, pairs)
    opened: list[Source] = []
    rendered: list[RenderedSet] = []
    for section in sources:
        one = render_files(section.path, chat, options, cache, max_drop_fraction=max_drop_fraction)
        name = phases.source_name(section.path, {source.name for source in opened})
        if twin := next((source for source in opened if source.tokens.fingerprint == one.fingerprint), None):
            raise InputError(
                f"data.sources: {section.path} holds the same conversations as {twin.name}; name it once, with the sum "
                "of the weights"
            )
        made = TokenSet(one.folder, "conversations", "uint32", one.fingerprint, one.train, one.held_out)
        opened.append(Source(name, made, mixtures.exact_weight(section.weight), section.max_epochs))
        rendered.append(one)
    data = DataSection(
        sources=tuple(sources),
        sequence_length=sequence_length,
        order="shuffled",
        document_mask=True,
        verify="off",
    )
    windows = {
        source.tokens.fingerprint: PackedRows(
            source.name, source.tokens.fingerprint, kind.items_of(one, "train"), one.folder, source.max_epochs
        )
        for source, one in zip(opened, rendered, strict=True)
    }
    laid = phases.lay_out(data, batch, seed, opened, windows, state, allow)
    limits = {source.tokens.fingerprint: source.max_epochs for source in opened if math.isfinite(source.max_epochs)}
    mixture = Mixture(laid, windows, limits, phases.carried_positions(state))
    return kind(data, opened, mixture, chat, rendered)
