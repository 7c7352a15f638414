"""Sample i -> (source, window): pure arithmetic over an immutable list of phases.

A phase fixes the mixture, the row length, the order and where each source starts; the last phase holds until the next
begins. Sources are chosen by exact integer arithmetic, so that each source has had exactly its share after each
multiple of the sum of the (integer) weights, and between them is less than ceil(log2(sources)) rows off: one for two
sources, two for four, three for eight. Nothing here reads a token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd, lcm
from typing import Any

import numpy as np

from argonne.data.windows import Position, RowKey, Rows, SourceRows
from argonne.errors import InputError


@dataclass(frozen=True)
class PhaseSource:
    """A source in a phase: which tokens (fingerprint), their share (an exact fraction as text), and where reading
    starts.
    """

    name: str
    fingerprint: str
    weight: str
    start: Position


@dataclass(frozen=True)
class Phase:
    """What holds from `first_step` (and `first_sample`) on. Never changed once a step of it was trained."""

    first_step: int
    first_sample: int
    rows: int
    sequence_length: int
    order: str
    documents: str
    document_mask: bool
    seed: int
    sources: tuple[PhaseSource, ...]

    @property
    def key(self) -> RowKey:
        return RowKey(self.sequence_length, self.order, self.documents, self.seed)

    @property
    def weights(self) -> list[int]:
        return integer_weights([source.weight for source in self.sources])

    def shares(self, samples: int) -> Iterable[tuple[PhaseSource, int]]:
        """Each source with how many of the first `samples` samples of the phase are its own."""
        return zip(self.sources, counts(self.weights, samples), strict=True)


def phase_from_json(tree: dict[str, Any]) -> Phase:
    sources = tuple(PhaseSource(**{**source, "start": Position(**source["start"])}) for source in tree["sources"])
    return Phase(**{**tree, "sources": sources})


def exact_weight(weight: float) -> str:
    """A weight as the exact fraction that its decimal digits say. Raises InputError below zero."""
    value = Fraction(str(weight))
    if value < 0:
        raise InputError(f"data.sources: weight {weight}, expected zero or more")
    return str(value)


def integer_weights(weights: Sequence[str]) -> list[int]:
    """The smallest whole numbers in the proportion of the weights. Raises InputError when all are zero."""
    fractions = [Fraction(weight) for weight in weights]
    if not any(fractions):
        raise InputError("data.sources: every weight is zero, expected at least one above")
    scale = lcm(*(value.denominator for value in fractions))
    whole = [int(value * scale) for value in fractions]
    divisor = gcd(*whole)
    return [value // divisor for value in whole]


def counts(weights: Sequence[int], samples: int) -> list[int]:
    """How many of the first `samples` samples each source has had. They sum to `samples`."""
    if len(weights) == 1:
        return [samples]
    half = len(weights) // 2
    left, right = weights[:half], weights[half:]
    total = sum(left) + sum(right)
    first = samples * sum(left) // total if total else 0
    return counts(left, first) + counts(right, samples - first)


def deal(weights: Sequence[int], start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """For samples start .. stop-1: (source index, how many earlier samples that source has had), both int64."""
    if len(weights) == 1:
        return np.zeros(stop - start, dtype=np.int64), np.arange(start, stop, dtype=np.int64)
    half = len(weights) // 2
    left, total = sum(weights[:half]), sum(weights)
    first, rest = divmod(start * left, total) if total else (0, 0)
    small = left * (stop - start + 1) + rest < 1 << 62
    steps = np.arange(stop - start + 1, dtype=np.int64 if small else object)
    reached = first + ((rest + steps * left) // max(total, 1)).astype(np.int64)
    goes_left = np.diff(reached) == 1
    source = np.where(goes_left, 0, half)
    draw = np.empty_like(source)
    begin, end = int(reached[0]), int(reached[-1])
    for side, part, low, high in (
        (goes_left, weights[:half], begin, end),
        (~goes_left, weights[half:], start - begin, stop - end),
    ):
        inner, draw[side] = deal(part, low, high)
        source[side] += inner
    return source, draw


@dataclass(frozen=True)
class GlobalRows:
    """The rows of a run of samples in order: source of each, and the pieces of tokens it is made of."""

    source: np.ndarray
    rows: Rows
    epoch: np.ndarray


class Mixture:
    """Phases over opened sources. `windows` has one entry a source name that any phase uses."""

    def __init__(
        self,
        phases: Sequence[Phase],
        windows: Mapping[str, SourceRows],
        max_epochs: dict[str, float] | None = None,
        carried: tuple[int, dict[str, Position]] | None = None,
    ) -> None:
        """`carried`: (step, positions) of a checkpoint, so that sources that are no longer open need not be."""
        self.phases = list(phases)
        self.windows = windows
        self.max_epochs = max_epochs or {}
        self._allowed: dict[int, int] = {}  # samples of a phase that are known to be within the limits
        self.carried_step, self.carried = carried or (0, {})

    def phase_at(self, step: int) -> Phase:
        if len(self.phases) == 1:
            return self.phases[0]
        return next(phase for phase in reversed(self.phases) if phase.first_step <= step)

    def samples_before(self, step: int) -> int:
        """Rows of the global batches of all steps before `step`."""
        phase = self.phase_at(step)
        return phase.first_sample + (step - phase.first_step) * phase.rows

    def tokens_before(self, step: int) -> int:
        return sum(length * phase.rows * phase.sequence_length for phase, length in self._spans(step))

    def _spans(self, step: int) -> Iterator[tuple[Phase, int]]:
        """Each phase that begins before `step` with the steps of it that lie before `step`."""
        for number, phase in enumerate(self.phases):
            until = min([step, *(following.first_step for following in self.phases[number + 1 : number + 2])])
            if until > phase.first_step:
                yield phase, until - phase.first_step

    def locate(self, phase: Phase, start: int, stop: int) -> GlobalRows:
        """Where samples start .. stop-1 of `phase` (global sample numbers) lie, whatever `max_epochs` says (see
        `check_rows`).

        Raises InputError where an earlier phase read a source that is no longer open.
        """
        if missing := [source.name for source in phase.sources if source.fingerprint not in self.windows]:
            raise InputError(
                f"data.sources: step {phase.first_step} and on read {', '.join(missing)}, which the recipe no longer "
                "names"
            )
        chosen, draw = deal(phase.weights, start - phase.first_sample, stop - phase.first_sample)
        rows = Rows.empty(stop - start)
        epochs = np.zeros(stop - start, dtype=np.int64)
        for number, source in enumerate(phase.sources):
            mine = np.nonzero(chosen == number)[0]
            if len(mine):
                part, epoch = self.windows[source.fingerprint].locate(phase.key, source.start, draw[mine])
                rows.put(mine, part)
                epochs[mine] = epoch
        return GlobalRows(chosen, rows, epochs)

    def _over_limit(self, phase: Phase, samples: int) -> str | None:
        """Why `samples` samples of `phase` are too many: the first source that would be read more often than its
        `max_epochs`.
        """
        for source, count in phase.shares(samples):
            limit = self.max_epochs.get(source.fingerprint)
            if limit is None or count == 0:
                continue
            passes = self.windows[source.fingerprint].passes(phase.key, source.start, count)
            if passes > limit + 1e-9:
                return (
                    f"data.sources: {source.name} would be read {passes:.3f} times, its max_epochs is {limit:g}; give "
                    "it less weight, train fewer steps, or raise max_epochs"
                )
        return None

    def check_rows(self, phase: Phase, stop: int) -> None:
        """Raise InputError when the samples of `phase` before global sample `stop` read a source more often than its
        `max_epochs`.
        """
        samples = stop - phase.first_sample
        if samples <= self._allowed.get(phase.first_step, 0):
            return
        if reason := self._over_limit(phase, samples):
            raise InputError(reason)
        # Some way ahead, not to the end of what is allowed: conversations would be packed for every pass up to it.
        ahead = max(2 * samples, 64 * phase.rows)
        self._allowed[phase.first_step] = samples if self._over_limit(phase, ahead) else ahead

    def check_steps(self, steps: int) -> None:
        """Raise InputError when a run of `steps` steps would read a source more often than its `max_epochs`."""
        for phase, length in self._spans(steps):
            if reason := self._over_limit(phase, length * phase.rows):
                raise InputError(reason)

    def positions(self, step: int) -> dict[str, Position]:
        """Where each source that was ever read stands before `step` (at or after the checkpoint's step), by
        fingerprint.
        """
        found = dict(self.carried)
        for phase, length in self._spans(step):
            if phase.first_step + length > self.carried_step:
                for source, count in phase.shares(length * phase.rows):
                    found[source.fingerprint] = self.windows[source.fingerprint].advance(phase.key, source.start, count)
        return found

    def draws(self, step: int) -> dict[str, tuple[int, int]]:
        """(rows, tokens) that each source has given before `step`, by fingerprint."""
        found: dict[str, tuple[int, int]] = {}
        for phase, length in self._spans(step):
            for source, count in phase.shares(length * phase.rows):
                rows, tokens = found.get(source.fingerprint, (0, 0))
                found[source.fingerprint] = (rows + count, tokens + count * phase.sequence_length)
        return found

    def passes(self, step: int) -> dict[str, float]:
        """Passes over each source before `step`, by fingerprint."""
        phase = self.phase_at(step)
        return {
            source.fingerprint: self.windows[source.fingerprint].passes(phase.key, source.start, count)
            for source, count in phase.shares((step - phase.first_step) * phase.rows)
        }

    def rows_available(self) -> int:
        """Samples that the first phase's mixture can draw before one source has been read once."""
        phase = self.phases[0]
        rows = [
            self.windows[source.fingerprint].rows_left(phase.key, replace(source.start, used=0))
            for source in phase.sources
        ]
        return bisect_left(
            range(1, sum(rows) + 1),
            True,
            key=lambda samples: any(count > room for (_, count), room in zip(phase.shares(samples), rows, strict=True)),
        )
