"""Where a training checkpoint of the family stood in its data, as the state that the loader goes on from.

`data_position` is the cursor of rank 0 in tokens. All ranks together have read everything before it, without a gap, as
long as the first pass over the file lasts: each micro-batch moves it by the tokens of all ranks, and a resume deals the
ranks out from it anew. In later passes the ranks have wrapped around at different moments, and no single position
describes them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from argonne.config import Recipe
from argonne.data.dataset import TrainingData, open_training_data
from argonne.data.mixture import Phase, PhaseSource
from argonne.data.phases import STATE_VERSION, batch_at
from argonne.data.windows import Position, RowKey
from argonne.errors import InputError
from argonne.legacy.training import TrainingFile

WRITTEN_BY = "argonne"


@dataclass(frozen=True)
class Carried:
    """The data state to start from, and what to say about it."""

    state: dict[str, Any]
    description: str


@dataclass(frozen=True)
class _Part:
    """Steps of the past that read one source from one place on."""

    steps: int
    tokens: int
    source: PhaseSource


class _Unknown(Exception):
    """Why the position means nothing in this data."""


def carried_position(file: TrainingFile, recipe: Recipe, *, from_start: bool) -> Carried:
    """The data state of a run that goes on from `file`: exactly its next window, or, `from_start`, the beginning of the
    recipe's data.

    Raises InputError where the position cannot be carried over and the start was not asked for.
    """
    past = f"before {file.path.name}"
    past_source = PhaseSource(past, f"earlier:{past}", "1", Position())
    length = batch_at(recipe.batch, recipe.data, file.step)[1]
    shown = _shown(file.content.get("data_position"))
    if from_start:
        _check_length_key(file, recipe)
        parts = [_Part(file.step, file.tokens, past_source)]
        state = _state(file, recipe, parts, length, {}, mask=recipe.data.document_mask)
        return Carried(state, f"the data from its start (was at {shown})")
    try:
        if recipe.data.input or len(recipe.data.sources) != 1:
            raise _Unknown("the recipe's data is not one token file")
        data = open_training_data(recipe.data, recipe.batch, recipe.seed)
        try:
            position = _position(file, recipe, data, length)
            parts = _parts(file, recipe, data, position, length, past_source)
        finally:
            data.close()
    except _Unknown as reason:
        raise InputError(
            f"{file.path}: its data_position ({shown}) cannot be carried over: {reason}; give the data that it was "
            "trained on, as one train.bin read in order with the same sequence length, or begin this data at its start "
            "with --data-from-start"
        ) from None
    if len(parts) != 1 or parts[0].source is past_source:
        _check_length_key(file, recipe)
    source = data.sources[0]
    state = _state(file, recipe, parts, length, {source.tokens.fingerprint: dataclasses.asdict(position)}, mask=False)
    passes = f" of pass {position.epoch + 1}" if position.epoch else ""
    at = f"token {position.used:,}{passes}, row {position.used // length:,} of {length:,} tokens"
    return Carried(state, f"{source.name} goes on at {at}")


def _shown(position: Any) -> str:
    if isinstance(position, dict):
        plain = [f"{name} = {value!r}" for name, value in position.items() if isinstance(value, int | float | str)]
        return ", ".join(plain)[:300] or "a table"
    return f"token {position:,}" if isinstance(position, int) else repr(position)[:300]


def _check_length_key(file: TrainingFile, recipe: Recipe) -> None:
    """Passes over this data are not what the step counter counts when other data came before."""
    if recipe.train.steps is None and recipe.train.tokens is None:
        raise InputError(
            f"train.epochs: the run goes on from step {file.step:,} and {file.tokens:,} tokens of other data, so "
            "passes do not say where it ends; give train.steps or train.tokens, counted from the beginning of the "
            "earlier run"
        )


def _position(file: TrainingFile, recipe: Recipe, data: TrainingData, length: int) -> Position:
    """The next token to read. Raises _Unknown where the file does not say it for this data."""
    content, tokens = file.content, data.sources[0].tokens
    found = content.get("data_position")
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise _Unknown("it is no count of tokens in one file")
    if recipe.data.order != "sequential" or recipe.data.documents != "packed":
        raise _Unknown(f"the recipe reads it {recipe.data.order}, documents {recipe.data.documents}")
    if len(tokens.train.shards) != 1:
        raise _Unknown(f"{tokens.path} is {len(tokens.train.shards)} files, not one")
    stored = file.sequence_length
    if stored is not None and stored != length:
        raise _Unknown(f"it was trained on rows of {stored:,} tokens, the recipe says {length:,}")
    if found % length:
        raise _Unknown(f"it is no multiple of the sequence length {length:,}")
    counted = content.get("dataset_num_tokens", tokens.tokens)
    if counted != tokens.tokens:
        raise _Unknown(f"its data had {counted:,} tokens, {tokens.path} has {tokens.tokens:,}")
    if content.get("dataset_fingerprint", tokens.fingerprint) != tokens.fingerprint:
        raise _Unknown(f"it was trained on other tokens than {tokens.path} holds")
    if found >= tokens.tokens:
        raise _Unknown(f"{tokens.path} has only {tokens.tokens:,} tokens")
    if content.get("written_by") == WRITTEN_BY:  # one cursor for all ranks: exact in every pass
        return Position(_whole(content, "dataset_epoch"), length, found)
    read = file.tokens - _whole(content, "dataset_base_tokens_processed")
    if read != found:
        raise _Unknown(
            f"{read:,} tokens were read, so this is not the first pass over one file, and later the ranks stood at "
            "different places"
        )
    return Position(0, length, found)


def _whole(content: dict[str, Any], name: str) -> int:
    value = content.get(name) or 0
    if not isinstance(value, int):
        raise _Unknown(f"its {name} is {value!r}, not a whole number")
    return value


def _parts(
    file: TrainingFile, recipe: Recipe, data: TrainingData, position: Position, length: int, past_source: PhaseSource
) -> list[_Part]:
    """The past as phases record it: what this data gave since it began, other data before; all of it as other data
    where that does not add up.
    """
    source, content = data.sources[0], file.content
    base_steps = _whole(content, "dataset_base_global_step")
    base_tokens = _whole(content, "dataset_base_tokens_processed")
    steps, tokens = file.step - base_steps, file.tokens - base_tokens
    whole = [_Part(file.step, file.tokens, past_source)]
    is_base = min(base_steps, base_tokens) >= 0 and (base_steps == 0) == (base_tokens == 0)
    if not is_base or steps < 1 or tokens < steps or tokens % length:
        return whole
    # The even spread of `_state` changes its rows on the way, and must not do so in a later pass.
    if position.epoch and tokens // length % steps:
        return whole
    windows = data.mixture.windows[source.tokens.fingerprint]
    if windows.advance(RowKey(length, "sequential", "packed", recipe.seed), Position(), tokens // length) != position:
        return whole
    mine = _Part(steps, tokens, PhaseSource(source.name, source.tokens.fingerprint, source.weight, Position()))
    return [_Part(base_steps, base_tokens, past_source), mine] if base_steps else [mine]


def _state(
    file: TrainingFile,
    recipe: Recipe,
    parts: list[_Part],
    length: int,
    places: dict[str, dict[str, int]],
    *,
    mask: bool,
) -> dict[str, Any]:
    """What a checkpoint of ours stores of the data: phases that add up to the steps and tokens of the past, and where
    each source stands.

    The file says nothing of how the batch changed on the way: the rows are spread as evenly as whole rows allow.
    """
    phases: list[Phase] = []
    step = sample = 0
    for part in parts if file.step else []:
        piece = length if part.tokens % length == 0 else 1
        fewer, more = divmod(part.tokens // piece, part.steps)
        source = part.source
        for steps, rows in ((part.steps - more, fewer), (more, fewer + 1)):
            if steps == 0:
                continue
            phases.append(
                Phase(step, sample, rows, piece, recipe.data.order, recipe.data.documents, mask, recipe.seed, (source,))
            )
            step, sample = step + steps, sample + steps * rows
            used = source.start.used + steps * rows * piece
            source = dataclasses.replace(source, start=Position(source.start.epoch, piece, used))
    return {
        "format_version": STATE_VERSION,
        "step": file.step,
        "samples": sample,
        "tokens": file.tokens,
        "phases": [dataclasses.asdict(phase) for phase in phases],
        "positions": places,
    }
