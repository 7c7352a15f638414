"""How long a run is: steps and tokens under a batch that changes at given steps, and passes over the sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from argonne import layout
from argonne.config import BatchSection, DataSection, Recipe
from argonne.errors import InputError
from argonne.recipe import batches


@dataclass(frozen=True)
class SourceUse:
    """What a run takes from one source. `tokens`: how many it holds, `passes`: how often it is read; None where that is not known.

    `here`: read from the token set on this disk, not from the release's figures.
    """

    path: str
    share: float
    tokens: int | None
    passes: float | None
    max_epochs: float
    here: bool


def tokens_before(batch: BatchSection, step: int) -> int:
    """Tokens trained before optimizer step `step`."""
    parts = [(min(first, step), tokens) for _, first, tokens, _ in batches(batch)]
    ends = [first for first, _ in parts[1:]] + [step]
    return sum((end - first) * tokens for (first, tokens), end in zip(parts, ends, strict=True))


def steps_within(tokens_before: Callable[[int], int], tokens: int) -> int:
    """The most steps that draw at most `tokens` tokens: a run never trains on more than was asked for. `tokens_before(step)` rises with it."""
    low, high = 0, 1
    while tokens_before(high) <= tokens:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens_before(middle) <= tokens else (low, middle)
    return low


def total_steps(recipe: Recipe, tokens_before: Callable[[int], int], tokens_per_epoch: Callable[[], int | None]) -> int | None:
    """Optimizer steps of the run; None where its length is in epochs of data that is not on this disk.

    tokens_before: tokens before a step, history and changes of batch included. tokens_per_epoch: asked only where the length is in epochs.
    Raises InputError for a length that makes no whole step.
    """
    train = recipe.train
    if train.steps is not None:
        return train.steps
    tokens = train.tokens
    if tokens is None:
        epoch = tokens_per_epoch()
        if epoch is None:
            return None
        tokens = int((train.epochs or 0) * epoch)
    steps = steps_within(tokens_before, tokens)
    if steps < 1:
        raise InputError(
            f"train: {tokens:,} tokens make no whole step of batch.tokens_per_step = {recipe.batch.tokens_per_step:,}; "
            "train longer or take a smaller batch"
        )
    return steps


def source_tokens(path: str) -> int | None:
    """Training tokens of a prepared token set, from its manifest; None where there is none to read."""
    manifest = Path(path) / layout.MANIFEST
    if not manifest.is_file():
        return None
    found = json.loads(manifest.read_text()).get("tokens")
    return found if isinstance(found, int) else None


def tokens_per_epoch(data: DataSection) -> int | None:
    """Tokens until the first source is used up, each drawn in proportion to its weight: one pass over the mixture."""
    known = [(source_tokens(source.path), source.weight) for source in data.sources]
    total = sum(weight for _, weight in known)
    if not known or any(tokens is None for tokens, _ in known) or total <= 0:
        return None
    return min(int(tokens * total / weight) for tokens, weight in known if tokens is not None and weight > 0)


def source_uses(data: DataSection, tokens: int | None, released: int | None = None) -> list[SourceUse]:
    """What a run of `tokens` tokens takes from each source of the mixture. released: tokens of a sole source that is not on this disk."""
    total = sum(source.weight for source in data.sources) or 1.0
    uses = []
    for source in data.sources:
        share, found = source.weight / total, source_tokens(source.path)
        held = found if found is not None or len(data.sources) > 1 else released
        passes = share * tokens / held if held and tokens is not None else None
        uses.append(SourceUse(source.path, share, held, passes, source.max_epochs, found is not None))
    return uses
