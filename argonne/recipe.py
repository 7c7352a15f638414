"""Recipes as files: read TOML, stack `base`s and overrides, check, resolve the model, write back with meanings, compare."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

from argonne import presets
from argonne.config import BatchSection, OptimSection, Recipe, ScheduleSection
from argonne.errors import InputError

Tree = dict[str, Any]
RECIPES = Path(__file__).with_name("recipes")

# What single numbers may be; `section.key` without a value is unset and not checked.
_AT_LEAST_1 = (
    *(f"model.{name}" for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")),
    *(f"model.{name}" for name in ("head_dim", "intermediate_size", "max_position_embeddings")),
    *("train.steps", "train.tokens", "train.checkpointing_stride", "checkpoint.keep_last", "checkpoint.sample_tokens", "log.every_steps"),
    *(f"parallel.{name}" for name in ("shard", "tensor", "context", "pipeline")),
)
_AT_LEAST_0 = (
    *("seed", "model.sliding_window", "model.final_logit_softcapping", "optim.weight_decay", "optim.grad_clip", "optim.max_skipped"),
    *("train.loss_chunk", "train.z_loss", "train.threads", "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep_every"),
    *("eval.every_steps", "eval.windows", "parallel.nproc", "parallel.replicate", "parallel.max_restarts"),
)
_ABOVE_0 = ("model.rope_theta", "model.rms_norm_eps", "optim.lr", "optim.eps", "optim.muon_lr", "train.epochs")
_BELOW_1 = ("model.attention_dropout", "model.hidden_dropout", "optim.betas", "optim.muon_momentum", "data.hold_out")
_RANGES: tuple[tuple[tuple[str, ...], str, typing.Callable[[float], bool]], ...] = (
    (_AT_LEAST_1, "at least 1", lambda value: value >= 1),
    (_AT_LEAST_0, "at least 0", lambda value: value >= 0),
    (_ABOVE_0, "more than 0", lambda value: value > 0),
    (_BELOW_1, "from 0 to below 1", lambda value: 0 <= value < 1),
    (("data.max_drop_fraction",), "from 0 to 1", lambda value: 0 <= value <= 1),
)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name_or_path: str, overrides: dict[str, str] | None = None) -> Recipe:
    """The checked and resolved recipe of a packaged name or a TOML file, with `section.key -> text` overrides applied last.

    Raises InputError for an unknown name, key or choice, a wrong type, or values that contradict one another.
    """
    tree = read_tree(name_or_path)
    for path, text in (overrides or {}).items():
        _set(tree, path, _parse_value(text))
    return resolve(build(Recipe, tree))


def read_tree(name_or_path: str, seen: tuple[str, ...] = ()) -> Tree:
    """The raw TOML tree with its `base` recipes merged below it."""
    path = _find(name_or_path)
    if str(path) in seen:
        raise InputError(f"{path}: base recipes form a circle: {' -> '.join([*seen, str(path)])}")
    try:
        tree = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    base = tree.pop("base", None)
    if base is None:
        return tree
    beside = path.parent / str(base)
    return _merge(read_tree(str(beside) if beside.is_file() else str(base), (*seen, str(path))), tree)


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml" or "/" in name_or_path:
        if not path.is_file():
            what = "is a folder, expected a .toml file" if path.is_dir() else "no such file"
            raise InputError(f"recipe {name_or_path}: {what}; packaged recipes: {', '.join(recipe_names())}")
        return path
    packaged = RECIPES / f"{name_or_path}.toml"
    if not packaged.is_file():
        near = difflib.get_close_matches(name_or_path, recipe_names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"no recipe {name_or_path!r}; {hint}give a .toml file or one of: {', '.join(recipe_names())}")
    return packaged


def _merge(base: Tree, top: Tree) -> Tree:
    merged = dict(base)
    for name, value in top.items():
        inner = merged.get(name)
        merged[name] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _parse_value(text: str) -> Any:
    """A command-line value as TOML, or else as a plain string: `3e-4`, `true`, `[1, 2]`, `cosine`."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: Tree, path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise InputError(f"--{path}: {section!r} is a value, not a section")
    tree[name] = value


def build(kind: type, tree: Any, where: str = "") -> Any:
    """An instance of the dataclass `kind` from a TOML tree; unknown keys, wrong types and choices are InputErrors that name the key."""
    if not isinstance(tree, dict):
        names = ", ".join(f"{item.name} = .." for item in dataclasses.fields(kind)[:2])
        raise InputError(f"{where or 'recipe'}: found {tree!r}, expected a table such as {{ {names} }}")
    hints = typing.get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind)}
    values = {}
    for name, value in tree.items():
        path = f"{where}.{name}" if where else name
        if name not in known:
            raise InputError(_unknown(path, name, known, where))
        values[name] = _convert(hints[name], value, path)
        choices = known[name].metadata.get("choices")
        if choices and values[name] is not None and values[name] not in choices:
            raise InputError(f"{path}: found {value!r}, expected one of {', '.join(map(repr, choices))}")
    return kind(**values)


def _unknown(path: str, name: str, known: dict[str, Any], where: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"unknown recipe key {path!r}; did you mean {f'{where}.{near[0]}' if where else near[0]!r}?"
    keys = all_keys()
    elsewhere = [other for other in keys if other.split(".")[-1] == name]
    words = name.replace("_", " ")  # another library's name for it: learning_rate for lr
    elsewhere += [other for other in keys if words in keys[other].metadata["meaning"] and other.startswith(where)]
    if elsewhere:
        return f"unknown recipe key {path!r}; did you mean {elsewhere[0]!r}?"
    return f"unknown recipe key {path!r}; known here: {', '.join(known)}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (value == "none" and type(None) in arguments):
            return None
        return _convert_union([item for item in arguments if item is not type(None)], value, path)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path)
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        hint is str
        and path.endswith((".wall_time", ".deadline", ".grace", ".timeout", ".telemetry_limit"))
        and isinstance(value, int | float)
    ):
        return str(value)
    if type(value) is not hint:
        raise InputError(f"{path}: found {value!r}, expected {_type_name(hint)}")
    return value


def _convert_union(options: list[Any], value: Any, path: str) -> Any:
    for option in options:
        try:
            return _convert(option, value, path)
        except InputError:
            continue
    raise InputError(f"{path}: found {value!r}, expected {' or '.join(map(_type_name, options))}")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        value = [value]
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if len(value) != len(arguments):
        raise InputError(f"{path}: found {len(value)} values, expected {len(arguments)}")
    return tuple(_convert(hint, item, path) for hint, item in zip(arguments, value, strict=True))


def _type_name(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def all_keys(kind: type = Recipe, where: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Every key of the recipe as `section.key`, in order."""
    hints = typing.get_type_hints(kind)
    found: dict[str, dataclasses.Field[Any]] = {}
    for item in dataclasses.fields(kind):
        path = f"{where}.{item.name}" if where else item.name
        if dataclasses.is_dataclass(hints[item.name]):
            found |= all_keys(typing.cast(type, hints[item.name]), path)
        else:
            found[path] = item
    return found


def resolve(recipe: Recipe) -> Recipe:
    """Fill the model from its preset and check what keys say together."""
    if recipe.model.preset is not None:
        fields = presets.preset(recipe.model.preset).fields
        given = {name: value for name, value in dataclasses.asdict(recipe.model).items() if value is not None}
        model = dataclasses.replace(recipe.model, **{**fields, **given})
        if model.num_hidden_layers != len(model.layer_types or ()) and "layer_types" not in given:
            pattern = fields["layer_types"]
            count = model.num_hidden_layers or 0
            model = dataclasses.replace(model, layer_types=tuple(pattern[layer % len(pattern)] for layer in range(count)))
        recipe = dataclasses.replace(recipe, model=model)
    check(recipe)
    return recipe


def check(recipe: Recipe) -> None:
    """Raise InputError where single values are out of range or contradict one another."""
    _check_ranges(recipe)
    presets.check(dataclasses.asdict(recipe.model))
    check_rates(recipe.optim, recipe.schedule)
    train, batch, data = recipe.train, recipe.batch, recipe.data
    lengths = [name for name in ("steps", "tokens", "epochs") if getattr(train, name) is not None]
    if len(lengths) != 1:
        raise InputError(f"train: found {' and '.join(lengths) or 'no length'}, expected exactly one of steps, tokens, epochs")
    if data.sources and data.input:
        raise InputError("data.sources and data.input are both set; keep one")
    if data.input and not data.tokenizer:
        raise InputError("data.tokenizer: not set, and data.input needs one; give the tokenizer's folder")
    for name, value in (("data.sequence_length", data.sequence_length), ("batch.tokens_per_step", batch.tokens_per_step)):
        if value < 1:
            raise InputError(f"{name}: found {value}, expected at least 1")
    for where, _, tokens, rows in batches(batch, data.sequence_length):
        if tokens % rows:
            raise InputError(
                f"{where}.tokens_per_step: found {tokens}, expected a multiple of the sequence length {rows}, as {tokens // rows * rows or rows}"
            )
    if isinstance(batch.micro, str) and batch.micro != "auto":
        raise InputError(f'batch.micro: found {batch.micro!r}, expected "auto" or a number of rows')
    if isinstance(batch.micro, int) and batch.micro < 1:
        raise InputError(f"batch.micro: found {batch.micro}, expected at least 1")


def batches(batch: BatchSection, sequence_length: int = 0) -> list[tuple[str, int, int, int]]:
    """(key, first step, tokens of a step, tokens of a row) of each part of a run. What a change leaves unset goes on from the part before."""
    found = [("batch", 0, batch.tokens_per_step, sequence_length)]
    for index, change in sorted(enumerate(batch.steps), key=lambda pair: pair[1].step):
        _, _, tokens, rows = found[-1]
        found.append((f"batch.steps[{index}]", change.step, change.tokens_per_step or tokens, change.sequence_length or rows))
    return found


def _check_ranges(recipe: Recipe) -> None:
    for paths, expected, holds in _RANGES:
        for path in paths:
            value: Any = recipe
            for name in path.split("."):
                value = getattr(value, name)
            for item in value if isinstance(value, tuple) else (value,):
                if item is not None and not holds(item):
                    raise InputError(f"{path}: found {item}, expected {expected}")


def check_rates(optim: OptimSection, schedule: ScheduleSection) -> None:
    """Raise InputError for a schedule that contradicts itself, however long the run is (`argonne.train.schedule` asks whether it fits)."""
    if schedule.kind not in ("cosine", "wsd", "constant", "steps"):
        raise InputError(f"schedule.kind: found {schedule.kind!r}, expected cosine, wsd, constant or steps")
    if schedule.warmup < 0:
        raise InputError(f"schedule.warmup: found {schedule.warmup}, expected 0 or more steps")
    _check_decay(schedule.kind, schedule.decay)
    if schedule.min_lr is not None and schedule.min_ratio is not None:
        raise InputError("schedule.min_lr and schedule.min_ratio are both set; keep one")
    if schedule.min_ratio is not None and not 0 <= schedule.min_ratio <= 1:
        raise InputError(f"schedule.min_ratio: found {schedule.min_ratio:g}, expected a share from 0 to 1")
    if schedule.min_lr is not None and not 0 <= schedule.min_lr <= optim.lr:
        raise InputError(f"schedule.min_lr: found {schedule.min_lr:g}, expected from 0 to optim.lr = {optim.lr:g}")
    _check_table(schedule)


def _check_decay(kind: str, decay: float | None) -> None:
    if kind != "wsd":
        if decay is not None:
            raise InputError(f"schedule.decay: found {decay:g}, but kind {kind!r} has no decay of its own; remove it or choose wsd")
        return
    if decay is None:
        raise InputError(
            "schedule.decay: not set, and a wsd schedule without decay never lowers the rate; give steps, a share, or 0 on purpose"
        )
    if decay < 0 or not math.isfinite(decay) or (decay > 1 and decay != int(decay)):
        raise InputError(f"schedule.decay: found {decay:g}, expected a whole number of steps, a share below 1, or 0")


def _check_table(schedule: ScheduleSection) -> None:
    if schedule.kind != "steps":
        if schedule.steps:
            raise InputError(f'schedule.steps: has entries, but kind is {schedule.kind!r}; remove them or choose "steps"')
        return
    if not schedule.steps:
        raise InputError('schedule.steps: empty, and kind "steps" needs [{ step, lr }]')
    starts = [change.step for change in schedule.steps]
    if starts[0] < 0 or any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        raise InputError(f"schedule.steps: found steps {starts}, expected rising numbers from 0 on")
    for change in schedule.steps:
        if change.lr <= 0:
            raise InputError(f"schedule.steps: found lr {change.lr:g} from step {change.step}, expected more than 0")


def to_tree(value: Any) -> Any:
    """Plain dicts and lists, None left out: what TOML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((item.name, getattr(value, item.name)) for item in dataclasses.fields(value))
        return {name: to_tree(inner) for name, inner in pairs if inner is not None}
    if isinstance(value, list | tuple):
        return [to_tree(item) for item in value]
    return value


def to_toml(recipe: Recipe) -> str:
    """The complete recipe as TOML, each key with its meaning as a comment; unset keys are commented out."""
    lines: list[str] = ["# Resolved and complete: what ran. `argonne pretrain config.toml` runs it again."]
    section = ""
    for path, item in all_keys().items():
        *parents, name = path.split(".")
        if (head := ".".join(parents)) != section:
            section = head
            lines += ["", f"[{section}]"]
        value: Any = recipe
        for part in path.split("."):
            value = getattr(value, part)
        meaning = f"  # {item.metadata['meaning']}"
        lines.append(f"# {name} = unset{meaning}" if value is None else f"{name} = {_toml(to_tree(value))}{meaning}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        escaped = "".join(_escape(character) for character in value)
        return f'"{escaped}"'
    return repr(value)


def _escape(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character >= " " and character != "\x7f" else f"\\u{ord(character):04x}"


def differences(old: Tree, new: Tree, where: str = "") -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ between two trees of `to_tree`, as `section.key -> (old, new)`."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in {**old, **new}:
        path = f"{where}.{name}" if where else name
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= differences(before, after, path)
        elif before != after:
            found[path] = (before, after)
    return found
