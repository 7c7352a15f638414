"""The rules of the recipe's keys: which there are, which act under a recipe, and what they may say
alone and together.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import typing
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from types import MappingProxyType
from typing import Any

from argonne import presets
from argonne.config import BatchSection, OptimSection, ParallelSection, Recipe, ScheduleSection
from argonne.declare import BOUNDS
from argonne.errors import InputError

HELD_OUT = "held-out data"
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@functools.cache
def all_keys(kind: type = Recipe, where: str = "") -> Mapping[str, dataclasses.Field[Any]]:
    """Every key of the recipe as `section.key`, in order."""
    hints = typing.get_type_hints(kind)
    found: dict[str, dataclasses.Field[Any]] = {}
    for item in dataclasses.fields(kind):
        path = f"{where}.{item.name}" if where else item.name
        if item.name == "given":
            continue
        if dataclasses.is_dataclass(hints[item.name]):
            found |= all_keys(typing.cast(type, hints[item.name]), path)
        else:
            found[path] = item
    return MappingProxyType(found)


def is_free(path: str) -> bool:
    """May this key differ on resume?"""
    return path in all_keys() and bool(all_keys()[path].metadata["free"])


def idle_without_held_out(recipe: Recipe) -> list[str]:
    """Keys that do nothing where nothing is held out. Raises InputError for a given one that asks for an evaluation."""
    idle = [path for path, item in all_keys().items() if HELD_OUT in item.metadata["needs"].split(" and ")]
    for path in idle:
        if path in recipe.given and value_of(recipe, path) and path != "eval.windows":  # how many, of those there are
            raise InputError(
                f"{path}: found {value_of(recipe, path)!r}, but it acts only with {HELD_OUT}, and the data holds "
                "nothing out; remove it, or prepare the text with --hold-out"
            )
    return idle


def value_of(recipe: Recipe, path: str) -> Any:
    """The value of `section.key`."""
    return functools.reduce(getattr, path.split("."), recipe)


def with_value(recipe: Recipe, path: str, value: Any) -> Recipe:
    """The recipe with another value of `section.key`."""
    section, dot, name = path.partition(".")
    return dataclasses.replace(
        recipe, **{section: dataclasses.replace(getattr(recipe, section), **{name: value}) if dot else value}
    )


def unmet(recipe: Recipe, path: str) -> str | None:
    """The need of a key that the recipe does not meet, so that the key does nothing; None where it acts.

    A need is conditions joined by " and ": `section.key` (set), `not section.key`, `section.key = a | b`, `!= a`, `has
    a`. "held-out data" is the data's to say (`argonne.stages.setup`); any other words are never met.
    """
    for condition in filter(None, all_keys()[path].metadata["needs"].split(" and ")):
        words = condition.removeprefix("not ").split(" ", 2)
        if condition == HELD_OUT:
            continue
        if words[0] not in all_keys():
            return condition
        value = value_of(recipe, words[0])
        if value is None and words[0].startswith("model.") and recipe.model.init_from:
            continue  # the weights will say
        if len(words) == 1:
            met = bool(value) != condition.startswith("not ")
        elif words[1] == "has":
            met = words[2] in (value or ())
        else:
            met = any(_is(value, word) for word in words[2].split(" | ")) == (words[1] == "=")
        if not met:
            return condition
    return None


def _is(value: Any, word: str) -> bool:
    return str(value) == word or (isinstance(value, int | float) and word.isdigit() and value == int(word))


def without_idle_keys(recipe: Recipe) -> Recipe:
    """Keys that do nothing back at their defaults: what a recipe says is what acts. One that was given, and asks for
    something, is refused.
    """
    for path, item in all_keys().items():
        if (need := unmet(recipe, path)) is None:
            continue
        if path in recipe.given and value_of(recipe, path) != item.default:
            raise InputError(
                f"{path}: found {value_of(recipe, path)!r}, but it acts only with {need}; remove it, or set that"
            )
        recipe = with_value(recipe, path, item.default)
    return recipe


def check(recipe: Recipe) -> None:
    """Raise InputError where single values are out of range or contradict one another."""
    _check_bounds(recipe)
    if recipe.model.init_from is None:  # else once the weights are known
        presets.check(dataclasses.asdict(recipe.model))
        check_sizes(dataclasses.asdict(recipe.model), recipe.parallel)
    check_rates(recipe.optim, recipe.schedule)
    train, batch, data = recipe.train, recipe.batch, recipe.data
    if train.precision == "fp16" and recipe.parallel.pipeline > 1:
        raise InputError(
            "train.precision: found fp16, expected bf16 or fp32 with parallel.pipeline: its stages would not agree on "
            "the loss scale"
        )
    lengths = [name for name in ("steps", "tokens", "epochs") if getattr(train, name) is not None]
    if len(lengths) != 1:
        raise InputError(
            f"train: found {' and '.join(lengths) or 'no length'}, expected exactly one of steps, tokens, epochs"
        )
    for path in ("stop.wall_time", "stop.grace", "log.telemetry_limit", "parallel.timeout"):
        if (duration := value_of(recipe, path)) is not None:
            parse_duration(duration, path)
    if recipe.stop.deadline is not None:
        parse_deadline(recipe.stop.deadline, "stop.deadline")
    if train.steps is not None:
        check_schedule(train.steps, recipe.schedule)
    if data.sources and data.input:
        raise InputError("data.sources and data.input are both set; keep one")
    if data.input and not data.tokenizer:
        raise InputError("data.tokenizer: not set, and data.input needs one; give the tokenizer's folder")
    _check_changes("batch.steps", sorted(change.step for change in batch.steps))
    for index, change in enumerate(batch.steps):
        if change.tokens_per_step is None and change.sequence_length is None:
            raise InputError(
                f"batch.steps[{index}]: changes nothing; give tokens_per_step or sequence_length, or remove it"
            )
    for where, _, tokens, rows in batches(batch, data.sequence_length):
        if tokens % rows:
            raise InputError(
                f"{where}.tokens_per_step: found {tokens}, expected a multiple of the sequence length {rows}, as "
                f"{tokens // rows * rows or rows}"
            )
    if isinstance(batch.micro, str) and batch.micro != "auto":
        raise InputError(f'batch.micro: found {batch.micro!r}, expected "auto" or a number of rows')
    if isinstance(batch.micro, int) and batch.micro < 1:
        raise InputError(f"batch.micro: found {batch.micro}, expected at least 1")


def batches(batch: BatchSection, sequence_length: int = 0) -> list[tuple[str, int, int, int]]:
    """(key, first step, tokens of a step, tokens of a row) of each part of a run. What a change leaves unset goes on
    from the part before.
    """
    found = [("batch", 0, batch.tokens_per_step, sequence_length)]
    for index, change in sorted(enumerate(batch.steps), key=lambda pair: pair[1].step):
        _, _, tokens, rows = found[-1]
        found.append(
            (f"batch.steps[{index}]", change.step, change.tokens_per_step or tokens, change.sequence_length or rows)
        )
    return found


def _check_bounds(section: Any, where: str = "") -> None:
    """Every number finite and within the bounds of its key, those in tables too."""
    for item in dataclasses.fields(section):
        value, path = getattr(section, item.name), f"{where}.{item.name}" if where else item.name
        for index, part in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
            place = path if index is None else f"{path}[{index}]"
            if dataclasses.is_dataclass(part):
                _check_bounds(part, place)
            elif isinstance(part, int | float) and not isinstance(part, bool):
                expected = item.metadata["bounds"]
                if not math.isfinite(part) or (expected and not BOUNDS[expected](part)):
                    raise InputError(f"{path}: found {part}, expected {expected or 'a finite number'}")


def _check_changes(path: str, starts: list[int]) -> None:
    if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        raise InputError(f"{path}: found steps {starts}, expected rising numbers, each once")


def check_rates(optim: OptimSection, schedule: ScheduleSection) -> None:
    """Raise InputError for a schedule that contradicts itself, however long the run is."""
    decay = schedule.decay
    if schedule.kind == "wsd" and decay is None:
        raise InputError(
            "schedule.decay: not set, and a wsd schedule without decay never lowers the rate; give steps, a share, or "
            "0 on purpose"
        )
    if decay is not None and decay > 1 and decay != int(decay):
        raise InputError(f"schedule.decay: found {decay:g}, expected a whole number of steps, a share below 1, or 0")
    if schedule.min_lr is not None and schedule.min_ratio is not None:
        raise InputError("schedule.min_lr and schedule.min_ratio are both set; keep one")
    if schedule.min_lr is not None and schedule.min_lr > optim.lr:
        raise InputError(f"schedule.min_lr: found {schedule.min_lr:g}, expected from 0 to optim.lr = {optim.lr:g}")
    if schedule.kind == "steps" and not schedule.steps:
        raise InputError('schedule.steps: empty, and kind "steps" needs [{ step, lr }]')
    _check_changes("schedule.steps", [change.step for change in schedule.steps])


def decay_steps(total_steps: int, schedule: ScheduleSection) -> int:
    """Steps of the decay: all after the warmup for a cosine; for wsd the given number, or the given share of the run,
    rounded.
    """
    if schedule.kind == "cosine":
        return total_steps - schedule.warmup
    if schedule.kind != "wsd":
        return 0
    decay = schedule.decay or 0.0
    return round(decay) if decay >= 1 else round(decay * total_steps)


def check_schedule(total_steps: int, schedule: ScheduleSection) -> None:
    """Raise InputError where the schedule does not fit into `total_steps`."""
    if total_steps < 1:
        raise InputError(
            f"train: the run has {total_steps} steps, expected at least 1; give more train.steps, tokens or epochs"
        )
    if schedule.warmup > total_steps:
        raise InputError(
            f"schedule.warmup: found {schedule.warmup} steps, more than the run's {total_steps}; lower it or train "
            "longer"
        )
    if schedule.kind != "wsd":
        return
    length = decay_steps(total_steps, schedule)
    if schedule.decay and not length:
        raise InputError(
            f"schedule.decay: a share of {schedule.decay:g} of {total_steps} steps is less than one step; give at "
            "least 1 step, or 0 on purpose"
        )
    if schedule.warmup + length > total_steps:
        raise InputError(
            f"schedule: {schedule.warmup} steps of warmup and {length} of decay do not fit into the run's "
            f"{total_steps}; shorten one"
        )


def check_mesh(parallel: ParallelSection, workers: int) -> None:
    """Refuse degrees that nothing would honour, or that so many workers cannot be: what the configuration says is what
    runs.
    """
    if parallel.async_tensor:
        raise InputError("parallel.async_tensor: found true, expected false; it is not built")
    for name, degree in (("tensor", parallel.tensor), ("pipeline", parallel.pipeline)):
        if degree > 1 and parallel.context > 1:
            raise InputError(
                f"[parallel]: found {name} {degree} and context {parallel.context}, expected one of them to be 1; "
                "they are not built together"
            )
    inner = {"pipeline": parallel.pipeline, "tensor": parallel.tensor, "context": parallel.context}
    inner = {name: degree for name, degree in inner.items() if degree > 1}
    places, left = divmod(workers, math.prod(inner.values()))
    if left or places % parallel.shard or parallel.replicate not in (0, places // parallel.shard):
        third = "".join(f" x {degree}" for degree in inner.values())
        asked = f"replicate {parallel.replicate or 'auto'} x shard {parallel.shard}"
        asked += "".join(f" x {name} {degree}" for name, degree in inner.items())
        fitting = " or ".join(
            f"{places // shard} x {shard}{third}" for shard in range(1, places + 1) if places % shard == 0
        )
        if left:
            divisors = " or ".join(str(number) for number in range(1, workers + 1) if workers % number == 0)
            fitting = f"a {' x '.join(inner)} of {divisors}"
        raise InputError(
            f"[parallel]: found {asked} on {workers} workers, expected degrees whose product is {workers}: {fitting}"
        )


def check_sizes(model: Mapping[str, Any], parallel: ParallelSection) -> None:
    """Refuse degrees that a model's heads, or its layers, cannot be dealt over. What it does not say is not asked."""
    if heads := model.get("num_attention_heads"):
        check_heads(heads, parallel.tensor)
    if layers := model.get("num_hidden_layers"):
        check_layers(layers, parallel.pipeline, parallel.stages if parallel.schedule == "interleaved" else 1)


def check_layers(layers: int, pipeline: int, stages: int) -> None:
    """Refuse more stages than layers; `stages`: of each worker."""
    if pipeline * stages > layers:
        each = f" x {stages} stages a worker" if stages > 1 else ""
        raise InputError(
            f"parallel.pipeline: found {pipeline}{each}, expected at most {layers} stages: the model has so many layers"
        )


def check_heads(heads: int, degree: int) -> None:
    """Refuse a tensor degree over which the heads of attention cannot be dealt; 0 is still to be chosen."""
    if degree and heads % degree:
        fitting = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise InputError(
            f"parallel.tensor: found {degree}, expected a degree that divides the {heads} attention heads: {fitting}"
        )


def parse_duration(text: str, where: str) -> float:
    """Seconds of `90`, `15m`, `1.5h`, `2d`, `12:30:00` or SLURM's `1-12:00:00`. Raises InputError naming the key, also
    for `12:30`, which is hours to one reader and minutes to another.
    """
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip()):
        return float(match[1]) * _UNITS[match[2] or "s"]
    if re.fullmatch(r"\d+:\d{1,2}", text.strip()):
        raise InputError(f"{where}: found {text!r}, expected hours or minutes: {text}:00 or 00:{text}")
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d{1,2})(?::(\d{1,2}))?", text.strip()):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return days * 86400.0 + hours * 3600.0 + minutes * 60.0 + seconds
    raise InputError(f"{where}: found {text!r}, expected seconds, or 90m, 12h, 2d, 12:30:00 or 1-12:00:00")


def parse_deadline(text: str, where: str) -> float:
    """Unix seconds of an ISO 8601 moment (local time where no zone is given) or of a number of Unix seconds."""
    with suppress(ValueError):
        return float(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise InputError(
            f"{where}: found {text!r}, expected ISO 8601 such as 2026-11-21T18:00:00+00:00, or Unix seconds"
        ) from None
