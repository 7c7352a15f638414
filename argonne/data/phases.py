"""The sources of a run and the phases of their order: history as a checkpoint recorded it, then what the recipe says
now.

History is never rewritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from argonne.config import BatchSection, DataSection
from argonne.data.mixture import Mixture, Phase, PhaseSource, exact_weight, phase_from_json
from argonne.data.windows import Position, SourceRows
from argonne.errors import InputError
from argonne.keys import batches
from argonne.tokens.formats import open_tokens
from argonne.tokens.shards import TokenSet
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer

STATE_VERSION = 1
END_TOKENS = 1 << 20  # looked at to learn what ends documents
# Keys whose change would reorder what was already read: refused on resume unless allowed.
FIXED_KEYS = {
    "order": "data.order",
    "documents": "data.documents",
    "document_mask": "data.document_mask",
    "seed": "seed",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened source of the mixture."""

    name: str
    tokens: TokenSet
    weight: str
    max_epochs: float


def open_sources(data: DataSection) -> list[Source]:
    sources: list[Source] = []
    for section in data.sources:
        opened = open_tokens(section.path)
        name = source_name(section.path, {source.name for source in sources})
        if twin := next((source for source in sources if source.tokens.fingerprint == opened.fingerprint), None):
            raise InputError(
                f"data.sources: {section.path} holds the same tokens as {twin.tokens.path}; name it once, with the sum "
                "of the weights"
            )
        sources.append(Source(name, opened, exact_weight(section.weight), section.max_epochs))
    return sources


def source_name(path: str, taken: set[str]) -> str:
    base = Path(path).stem if Path(path).suffix == ".bin" and Path(path).stem != "train" else Path(path).name
    base = Path(path).parent.name if base in ("train.bin", "train") else base
    return (
        base
        if base not in taken
        else next(f"{base}-{number}" for number in range(2, 1000) if f"{base}-{number}" not in taken)
    )


def shared_tokenizer(data: DataSection, sources: Sequence[Source]) -> TextTokenizer:
    """The tokenizer that all sources share."""
    folders = [source.tokens.tokenizer_folder for source in sources if source.tokens.tokenizer_folder is not None]
    folder = Path(data.tokenizer) if data.tokenizer else (folders[0] if folders else None)
    if folder is None:
        raise InputError(
            f"{sources[0].tokens.path}: does not say which tokenizer made it; set data.tokenizer to that tokenizer's "
            "folder"
        )
    tokenizer = load_tokenizer(folder)
    for source in sources:
        made_with = source.tokens.tokenizer_fingerprint
        if made_with is not None and made_with != tokenizer.fingerprint:
            raise InputError(
                f"{source.tokens.path}: was made with another tokenizer (fingerprint {made_with[:12]}) than {folder} "
                f"({tokenizer.fingerprint[:12]}); prepare it again with that tokenizer, or remove data.tokenizer"
            )
    ends = (end_of(source.tokens, tokenizer) for source in sources)
    return tokenizer.ending_as(next((end for end in ends if end is not None), None))


def end_of(tokens: TokenSet, tokenizer: TextTokenizer) -> int | None:
    """The id that ends its documents: as it was recorded, else the one of the tokenizer's ends that its beginning holds
    most of; None where it holds none.
    """
    if tokens.eos_id is not None or len(tokenizer.stop_ids) < 2:
        return tokens.eos_id
    ids = np.empty(min(tokens.train.tokens, END_TOKENS), np.int64)
    tokens.train.copy(0, ids)
    counts = {end: np.count_nonzero(ids == end) for end in tokenizer.stop_ids}
    return max(counts, key=lambda end: counts[end]) if any(counts.values()) else None


def batch_at(batch: BatchSection, data: DataSection, step: int) -> tuple[int, int]:
    """(rows, sequence length) that the recipe asks for at `step`."""
    *_, (_, _, tokens, length) = [part for part in batches(batch, data.sequence_length) if part[1] <= step]
    if tokens % length or tokens < length:
        raise InputError(
            f"batch.tokens_per_step: found {tokens} at step {step}, expected a multiple of the sequence length {length}"
        )
    return tokens // length, length


def lay_out(
    data: DataSection,
    batch: BatchSection,
    seed: int,
    sources: Sequence[Source],
    windows: Mapping[str, SourceRows],
    state: dict[str, Any] | None,
    allow: frozenset[str],
) -> list[Phase]:
    """Phases from step 0 on. With `state`, those before its step are kept; a recipe that differs from the last of them
    begins a new one.
    """
    phases: list[Phase] = []
    carried = carried_positions(state)
    now = carried[0]
    if state is not None:
        if state.get("format_version") != STATE_VERSION:
            raise InputError(
                f"the checkpoint's data state has version {state.get('format_version')}, this argonne reads "
                f"{STATE_VERSION}; update argonne"
            )
        phases = [phase_from_json(tree) for tree in state["phases"] if tree["first_step"] < max(now, 1)]
    if phases:
        _check_history(phases, now, data, batch, seed, sources, allow)
    for step in [now, *sorted({change.step for change in batch.steps if change.step > now})]:
        rows, length = batch_at(batch, data, step)
        positions = Mixture(phases, windows, carried=carried).positions(step)
        first_sample = 0
        if phases:
            last = phases[-1]
            first_sample = last.first_sample + (step - last.first_step) * last.rows
            if (last.order, last.documents, last.seed) != (data.order, data.documents, seed):
                # Another order has no common cut with the epoch underway: each source goes on with its next epoch.
                positions = {name: Position(place.epoch + (place.used > 0), 0, 0) for name, place in positions.items()}
        listed = []
        for source in sources:
            place = positions.get(source.tokens.fingerprint, Position())
            place = dataclasses.replace(place, piece=length) if place.used == 0 else place
            listed.append(PhaseSource(source.name, source.tokens.fingerprint, source.weight, place))
        found = Phase(
            step, first_sample, rows, length, data.order, data.documents, data.document_mask, seed, tuple(listed)
        )
        if not phases or _asks(found) != _asks(phases[-1]):
            phases.append(found)
    return phases


def carried_positions(state: dict[str, Any] | None) -> tuple[int, dict[str, Position]]:
    """(step, position of every source ever read) of a checkpoint."""
    if state is None:
        return 0, {}
    return int(state["step"]), {name: Position(**place) for name, place in state["positions"].items()}


def _asks(phase: Phase) -> dict[str, Any]:
    """Everything but where it begins: two phases that ask for the same draw alike."""
    return {
        **vars(phase),
        "first_step": 0,
        "first_sample": 0,
        "sources": [(source.fingerprint, source.weight) for source in phase.sources],
    }


def _check_history(
    history: Sequence[Phase],
    now: int,
    data: DataSection,
    batch: BatchSection,
    seed: int,
    sources: Sequence[Source],
    allow: frozenset[str],
) -> None:
    last = history[-1]
    asked = {"order": data.order, "documents": data.documents, "document_mask": data.document_mask, "seed": seed}
    for name, key in FIXED_KEYS.items():
        if getattr(last, name) != asked[name] and key not in allow:
            said = f"the checkpoint trained with {getattr(last, name)!r}, the recipe says {asked[name]!r}"
            raise InputError(f"{key}: {said}; restore it, or pass --allow {key}")
    by_name = {source.name: source.fingerprint for phase in history for source in phase.sources}
    for source in sources:
        known = by_name.get(source.name)
        if known not in (None, source.tokens.fingerprint) and "data.sources" not in allow:
            raise InputError(
                f"data.sources: {source.name} holds other tokens than the checkpoint trained on (fingerprint "
                f"{source.tokens.fingerprint[:12]}, then {known[:12] if known else None}); restore them, give the new "
                "ones another name, or pass --allow data.sources"
            )
    for change in batch.steps:
        if change.step < now:
            phase = next(item for item in reversed(history) if item.first_step <= change.step)
            expected = batch_at(batch, data, change.step)
            if (phase.rows, phase.sequence_length) != expected and "batch.steps" not in allow:
                raise InputError(
                    f"batch.steps: says {expected[0]} rows of {expected[1]} at step {change.step}, but the run trained "
                    f"{phase.rows} rows of {phase.sequence_length} there; history cannot change: give the change a "
                    f"step from {now} on, or pass --allow batch.steps"
                )
