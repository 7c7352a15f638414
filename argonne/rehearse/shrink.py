"""The one function that makes a recipe small enough for a rehearsal: width, depth, length; every other key stays."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from argonne.config import CHAT_STAGES, Recipe
from argonne.files import write_text
from argonne.keys import all_keys, batches, unmet, value_of, with_value
from argonne.plan.build import tokens_before, tokens_per_epoch, total_steps
from argonne.plan.shape import is_open
from argonne.presets import FULL
from argonne.recipe import to_tree, toml_value

STEPS, SAVE_EVERY = 12, 4
CHAT_STEPS, CHAT_SAVE_EVERY = 6, 2  # whole rows over a whole vocabulary take most of a rehearsal
HIDDEN, INTERMEDIATE, LAYERS, KEY_VALUE_HEADS = 32, 64, 4, 2
TEXT_ROWS, CHAT_ROWS = 4, 1  # of a step, at most before ranks ask for more
TEXT_ROW, CHAT_ROW = (32, 256), 1024  # tokens: a sixteenth of text within these; conversations stay whole
RANKS = 4
MOST = {"eval.windows": 2, "eval.task_limit": 2, "checkpoint.sample_tokens": 8, "chat.probes": 2}
QUESTION = 128  # bytes, and so tokens at most, of a probe's question in its template
UNSEEN = "kernels of the card, its memory and speed; the real width, depth and context"


@dataclass(frozen=True)
class Small:
    """recipe: the small one. changed: `section.key` -> (from, to). untold: what a CPU could not rehearse of it."""

    recipe: Recipe
    changed: dict[str, tuple[Any, Any]]
    untold: list[str]


def shrink(recipe: Recipe, *, workers: int = 0, instead: Mapping[str, Any] | None = None) -> Small:
    """The recipe as it is rehearsed.

    The model keeps its kind: one period of its layers at least, the ratio of its heads and their width, so that rotary
    positions mean the same. The vocabulary stays, since the ids of the data are the tokenizer's. Of a run from given
    weights only fields that a person wrote are made smaller: the others are the weights' to say. workers: that the real
    run would have, 0: not known. instead: keys that are other in a rehearsal, such as where a former run lies.
    """
    values: dict[str, Any] = {**_model(recipe), **_length(recipe), **_mesh(recipe, workers)}
    values |= _batch(recipe, max(1, values["parallel.nproc"])) | _device(recipe)
    values |= {path: min(value_of(recipe, path), most) for path, most in MOST.items()}
    context = recipe.model.max_position_embeddings or recipe.data.sequence_length
    longest = QUESTION + len(recipe.checkpoint.sample_prompt.encode())
    if recipe.checkpoint.sample_tokens + longest > context:  # whether they fit is to be seen
        del values["checkpoint.sample_tokens"]
    values |= {"log.every_steps": 1, "log.wandb": None, "log.trackio": None, "chat.cache": None}
    values |= {"stop.wall_time": None, "stop.deadline": None, **(instead or {})}
    small, changed = recipe, {}
    for path, value in values.items():
        before = value_of(recipe, path)
        if before != value and (unmet(recipe, path) is None or path in (instead or {})):
            small, changed[path] = with_value(small, path, value), (before, value)
    return Small(small, changed, _untold(recipe, changed))


def _model(recipe: Recipe) -> dict[str, Any]:
    model = recipe.model
    found: dict[str, Any] = {}
    heads, shared, layers = model.num_attention_heads, model.num_key_value_heads, model.num_hidden_layers
    if model.hidden_size:
        found |= {"hidden_size": min(model.hidden_size, HIDDEN), "intermediate_size": INTERMEDIATE}
    if model.intermediate_size:
        found["intermediate_size"] = min(model.intermediate_size, INTERMEDIATE)
    if heads:
        pairs = min(shared or heads, max(KEY_VALUE_HEADS, recipe.parallel.tensor))
        found |= {"num_attention_heads": heads // (shared or heads) * pairs, "num_key_value_heads": pairs}
        if model.hidden_size:
            found["head_dim"] = model.head_dim or model.hidden_size // heads
    if layers:
        kinds = model.layer_types or (FULL,) * layers
        parallel = recipe.parallel
        least = max(LAYERS, parallel.pipeline * (parallel.stages if parallel.schedule == "interleaved" else 1))
        found["num_hidden_layers"] = min(layers, -(-least // period_of(kinds)) * period_of(kinds))
        if model.layer_types:
            found["layer_types"] = kinds[: found["num_hidden_layers"]]
    if model.sliding_window:
        found["sliding_window"] = min(model.sliding_window, max(4, model.sliding_window // 16))
    fresh = model.init_from is None
    return {f"model.{name}": value for name, value in found.items() if fresh or not is_open(recipe, name)}


def period_of(kinds: tuple[str, ...]) -> int:
    """The shortest beginning that the layers repeat."""
    return next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))


def real_steps(recipe: Recipe) -> int | None:
    """Steps of the real run; None where only the data would tell."""
    text = recipe.stage not in CHAT_STAGES
    return total_steps(
        recipe, partial(tokens_before, recipe.batch), lambda: tokens_per_epoch(recipe.data) if text else None
    )


def _few(recipe: Recipe) -> tuple[int, int]:
    """Steps of the small run at most, and those between its saves."""
    return (CHAT_STEPS, CHAT_SAVE_EVERY) if recipe.stage in CHAT_STAGES else (STEPS, SAVE_EVERY)


def _length(recipe: Recipe) -> dict[str, Any]:
    """Few steps, in which each thing happens that happens in the real ones."""
    schedule, checkpoint = recipe.schedule, recipe.checkpoint
    events = [*(change.step for change in recipe.batch.steps), *(change.step for change in schedule.steps)]
    few, save_every = _few(recipe)
    real = real_steps(recipe) or 2 * max([few, *events])
    steps = min(real, few)
    found: dict[str, Any] = {"train.steps": steps, "train.tokens": None, "train.epochs": None}
    found["schedule.warmup"] = min(schedule.warmup, max(1, steps // 6))
    if schedule.decay is not None and schedule.decay >= 1:
        found["schedule.decay"] = float(
            max(1, min(round(schedule.decay * steps / real), steps - found["schedule.warmup"]))
        )
    if schedule.steps:
        at = moments([change.step for change in schedule.steps], real, steps)
        found["schedule.steps"] = tuple(
            replace(change, step=step) for change, step in zip(schedule.steps, at, strict=True)
        )
    every = max(1, min(save_every, steps // 2))
    if not checkpoint.every_steps or checkpoint.every_steps > every:
        found["checkpoint.every_steps"] = every
    if checkpoint.keep_every:
        found["checkpoint.keep_every"] = 2 * every
    if recipe.eval.every_steps:
        found["eval.every_steps"] = min(recipe.eval.every_steps, every)
    return found


def moments(steps: list[int], real: int, small: int) -> list[int]:
    """Where the steps of a run of `real` lie in one of `small`: in their order, each once, before its end where they
    can be.
    """
    found: list[int] = []
    for step in steps:
        least = found[-1] + 1 if found else min(step, 1)
        found.append(max(least, min(round(step * small / real), small - 1) if step < real else small))
    return found


def _mesh(recipe: Recipe, workers: int) -> dict[str, Any]:
    """The mesh on at most `RANKS` ranks: the largest degree is halved until it fits."""
    parallel = recipe.parallel
    names = ("replicate", "shard", "tensor", "context", "pipeline")
    degrees = {name: getattr(parallel, name) for name in names}
    product = _product(degrees)
    count = parallel.nproc or workers or product
    if not degrees["replicate"] and count % product == 0 and count > product:
        degrees["replicate"] = count // product
    while _product(degrees) > RANKS:
        most = max(degrees, key=lambda name: degrees[name])
        degrees[most] = degrees[most] // 2
    found: dict[str, Any] = {f"parallel.{name}": degree for name, degree in degrees.items()}
    if not parallel.replicate:
        found.pop("parallel.replicate")
    wrong = count % product or (parallel.replicate and count != product)
    ranks = min(count, RANKS) if wrong else _product(degrees)  # what does not fit is the verb's to say
    return found | {"parallel.nproc": ranks if ranks > 1 else parallel.nproc and 1}


def _product(degrees: Mapping[str, int]) -> int:
    return math.prod(degree or 1 for degree in degrees.values())


def _batch(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """Rows and their length, in the proportions of the real ones; each rank has rows."""
    chat = recipe.stage in CHAT_STAGES
    parts = batches(recipe.batch, recipe.data.sequence_length)
    least, longest = (CHAT_ROW, CHAT_ROW) if chat else TEXT_ROW
    lengths = [min(row, max(least, min(row // 16, longest))) for *_, row in parts]
    rows = [tokens // row for _, _, tokens, row in parts]
    most = max(CHAT_ROWS if chat else TEXT_ROWS, ranks)
    few = [min(real, max(1, round(most * real / max(rows[0], 1)))) for real in rows]
    few = [min(real, -(-count // ranks) * ranks) for real, count in zip(rows, few, strict=True)]
    for index, (before, real) in enumerate(itertools.pairwise(rows), 1):  # a change stays one
        if real != before and few[index] == few[index - 1]:
            few[index] = few[index - 1] + ranks if real > before else max(ranks, few[index - 1] - ranks)
    found: dict[str, Any] = {"data.sequence_length": lengths[0], "batch.tokens_per_step": few[0] * lengths[0]}
    if recipe.parallel.pipeline > 1:  # as many micro-batches as in the real run, and of those left open all that can be
        micro = recipe.batch.micro
        found["batch.micro"] = max(1, micro * few[0] // rows[0]) if isinstance(micro, int) else 1
    if recipe.batch.steps:
        real = real_steps(recipe) or 2 * max(change.step for change in recipe.batch.steps)
        at = moments([step for _, step, *_ in parts[1:]], real, min(real, _few(recipe)[0]))
        ordered = sorted(recipe.batch.steps, key=lambda change: change.step)
        found["batch.steps"] = tuple(
            replace(
                change,
                step=step,
                tokens_per_step=count * length,
                sequence_length=change.sequence_length and length,
            )
            for change, step, count, length in zip(ordered, at, few[1:], lengths[1:], strict=True)
        )
    return found


def _device(recipe: Recipe) -> dict[str, Any]:
    train = recipe.train
    found: dict[str, Any] = {}
    if train.device not in ("auto", "cpu"):
        found["train.device"] = "cpu"
    if train.compile == "on":
        found["train.compile"] = "off"
    if train.attention in ("flash", "varlen", "flex"):
        found["train.attention"] = "auto"
    if train.return_memory == "auto":  # each page of freed logits would be asked for again
        found["train.return_memory"] = "off"
    if recipe.parallel.async_tensor:
        found["parallel.async_tensor"] = False
    return found


def _untold(recipe: Recipe, changed: Mapping[str, Any]) -> list[str]:
    told = [UNSEEN]
    of = {
        "train.compile": "compiled blocks",
        "train.attention": f"attention by {recipe.train.attention}",
        "parallel.async_tensor": "overlapped tensor collectives",
        "parallel.nproc": f"more than {RANKS} workers, and several nodes",
        "log.wandb": "Weights & Biases",
        "log.trackio": "trackio",
    }
    return told + [said for path, said in of.items() if path in changed]


def write_small(name: str, small: Small, folder: Path) -> Path:
    """Write the small recipe as a file above the real one, and return it: what was written by a person there counts as
    written by one here.

    Two files, since keys in a file of one's own are a person's, and those of its base are not.
    """
    base = str(Path(name).resolve()) if Path(name).is_file() else name
    below = {path: to for path, (_, to) in small.changed.items() if path not in small.recipe.given}
    above = {path: value_of(small.recipe, path) for path in small.recipe.given & all_keys().keys()}
    if above.keys() & {"train.tokens", "train.epochs"}:
        above["train.steps"] = small.recipe.train.steps
    folder.mkdir(parents=True, exist_ok=True)
    for file, under, values in (("below.toml", base, below), ("rehearsal.toml", "below.toml", above)):
        shown = {path: '"unset"' if value is None else toml_value(to_tree(value)) for path, value in values.items()}
        lines = [f"base = {json.dumps(under)}", *(f"{path} = {value}" for path, value in sorted(shown.items()))]
        write_text(folder / file, "\n".join(lines) + "\n")
    return folder / "rehearsal.toml"
