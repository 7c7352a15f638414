"""How long a run is: steps and tokens under a batch that changes at given steps, and passes over the sources."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from argonne import layout
from argonne.config import BatchSection, DataSection, Recipe


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
    total, start, tokens = 0, 0, batch.tokens_per_step
    for change in sorted(batch.steps, key=lambda change: change.step):
        if change.step >= step:
            break
        total, start = total + (change.step - start) * tokens, change.step
        tokens = change.tokens_per_step or tokens
    return total + (step - start) * tokens


def steps_within(batch: BatchSection, tokens: int) -> int:
    """Whole steps that `tokens` make: a run never trains on more than was asked for."""
    start, per_step, used = 0, batch.tokens_per_step, 0
    for change in sorted(batch.steps, key=lambda change: change.step):
        if used + (change.step - start) * per_step > tokens:
            break
        used, start = used + (change.step - start) * per_step, change.step
        per_step = change.tokens_per_step or per_step
    return start + (tokens - used) // per_step


def total_steps(recipe: Recipe, tokens_per_epoch: int | None) -> int | None:
    """Optimizer steps of the run; None where its length is in epochs of data that is not on this disk."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    if recipe.train.tokens is not None:
        return steps_within(recipe.batch, recipe.train.tokens)
    if tokens_per_epoch is None:
        return None
    return steps_within(recipe.batch, int((recipe.train.epochs or 0) * tokens_per_epoch))


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
