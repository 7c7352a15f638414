"""Recipes as files: read TOML, stack `base`s and overrides, check, resolve the model, write back with meanings,
compare.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import tomllib
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from argonne import presets
from argonne.config import Recipe
from argonne.errors import InputError
from argonne.keys import all_keys, check, unmet, value_of, with_value, without_idle_keys

Tree = dict[str, Any]
# How runs began their config.toml while they still wrote the keys that did nothing too.
OLD_RECORD = "# Resolved and complete: what ran."
RECIPES = Path(__file__).with_name("recipes")
ALTERNATIVES = (
    ("data.sources", "data.input"),
    ("train.steps", "train.tokens", "train.epochs"),
    ("schedule.min_lr", "schedule.min_ratio"),
)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The checked and resolved recipe of a packaged name or a TOML file, with `section.key -> text` overrides applied
    last.

    What a person wrote counts as given: the overrides, and the keys of a file of their own; not those of a packaged
    recipe, a base or a preset. Raises InputError for an unknown name, key or choice, a wrong type, values that
    contradict one another, or a given key that would do nothing.
    """
    tree = read_tree(name_or_path)
    text = "" if is_packaged(name_or_path) else Path(name_or_path).read_text()
    given = set() if text.startswith(OLD_RECORD) else set(leaves(tomllib.loads(text)))
    for path, value in (overrides or {}).items():
        if path == "data.sources" and not isinstance(value, str):
            value = _as_often(tree, value)
        _set(tree, path, parse_value(path, value) if isinstance(value, str) else value)
        given = given - {path} if value in ("none", "unset") else given | {path}
    return resolve(_chosen(dataclasses.replace(build(Recipe, tree), given=frozenset(given))))


def _as_often(tree: Tree, sources: list[Tree]) -> list[Tree]:
    """Sources given as mere paths, read as often as the recipe says of its own, where it says one thing of all."""
    known = tree.get("data", {}).get("sources", [])
    tables = [source for source in known if isinstance(source, dict)] if isinstance(known, list) else []
    says = {source.get("max_epochs") for source in tables}
    often = {"max_epochs": says.pop()} if len(says) == 1 and None not in says else {}
    return [{**often, **source} for source in sources]


def _chosen(recipe: Recipe) -> Recipe:
    """Of keys that say one thing in several ways, a given one takes the place of those that a base or a packaged recipe
    says.
    """
    for ways in ALTERNATIVES:
        if recipe.given & set(ways) and any(value_of(recipe, path) for path in recipe.given & set(ways)):
            for path in set(ways) - recipe.given:
                recipe = with_value(recipe, path, all_keys()[path].default)
    return recipe


def is_packaged(name_or_path: str) -> bool:
    return name_or_path in recipe_names()


def recipe_name(name_or_path: str) -> str:
    """What a packaged recipe or a recipe file is called, and its run by default: `nano-3.0`, `my` of `of/my.toml`."""
    return Path(name_or_path).name.removesuffix(".toml")


def leaves(tree: Tree, where: str = "") -> Iterator[str]:
    """The keys of a tree as `section.key`."""
    for name, value in tree.items():
        path = f"{where}.{name}" if where else name
        if isinstance(value, dict):
            yield from leaves(value, path)
        else:
            yield path


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
            name = recipe_name(name_or_path)
            near = f"did you mean the packaged recipe {name!r}? " if is_packaged(name) else ""
            raise InputError(f"recipe {name_or_path}: {what}; {near}packaged recipes: {', '.join(recipe_names())}")
        return path
    packaged = RECIPES / f"{name_or_path}.toml"
    if not packaged.is_file():
        alike = difflib.get_close_matches(name_or_path, recipe_names(), n=1)
        hint = f"did you mean {alike[0]!r}? " if alike else ""
        raise InputError(f"no recipe {name_or_path!r}; {hint}give a .toml file or one of: {', '.join(recipe_names())}")
    return packaged


def _merge(base: Tree, top: Tree) -> Tree:
    merged = dict(base)
    for name, value in top.items():
        inner = merged.get(name)
        merged[name] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def parse_value(path: str, text: str) -> Any:
    """A command-line value as TOML, or else as a plain string: `3e-4`, `true`, `[1, 2]`, `cosine`. Raises InputError
    for half a table.
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if not text.lstrip().startswith(("[", "{")):
            return text
        example = (
            '[{ path = "tokens/a", weight = 0.7 }], the whole in single quotes'
            if path.endswith("sources")
            else '[1, 2] or ["a", "b"]'
        )
        shorter = ", or shorter as --data.sources tokens/a:0.7 tokens/b:0.3" if path == "data.sources" else ""
        raise InputError(f"--{path}: found {text}, expected TOML such as {example}{shorter}") from None


def _set(tree: Tree, path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise InputError(f"--{path}: {section!r} is a value, not a section")
    tree[name] = value


def build(kind: type, tree: Any, where: str = "") -> Any:
    """An instance of the dataclass `kind` from a TOML tree; unknown keys, wrong types and choices are InputErrors that
    name the key.
    """
    if not isinstance(tree, dict):
        names = ", ".join(f"{item.name} = .." for item in dataclasses.fields(kind)[:2])
        raise InputError(f"{where or 'recipe'}: found {tree!r}, expected a table such as {{ {names} }}")
    hints = typing.get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind) if item.name != "given"}
    values = {}
    for name, value in tree.items():
        path = f"{where}.{name}" if where else name
        if name not in known:
            raise InputError(_unknown(path, name, known, where))
        zero = known[name].metadata.get("zero")
        values[name] = 0 if zero and value == zero else _convert(hints[name], value, path)
        choices = known[name].metadata.get("choices")
        if choices and values[name] is not None and values[name] not in choices:
            raise InputError(f"{path}: found {value!r}, expected one of {', '.join(map(repr, choices))}")
    return kind(**values)


def _unknown(path: str, name: str, known: Mapping[str, Any], where: str) -> str:
    keys = all_keys()
    # The same name in another section, a table last (train.steps before schedule.steps); then what is written alike,
    # here or anywhere.
    same = sorted(
        (other for other in keys if other.rpartition(".")[2] == name), key=lambda other: keys[other].default == ()
    )
    near = [f"{where}.{other}" if where else other for other in difflib.get_close_matches(name, known, n=1)]
    words = name.replace("_", " ")  # another library's name for it: learning_rate for lr
    meant = [other for other in keys if words in keys[other].metadata["meaning"] and other.startswith(where)]
    if found := [*same, *near, *meant]:
        return f"unknown recipe key {path!r}; did you mean {found[0]!r}?"
    return f"unknown recipe key {path!r}; known here: {', '.join(known)}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (value in ("none", "unset") and type(None) in arguments):
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
        and isinstance(value, int | float | datetime.time | datetime.datetime)
    ):
        return str(value)  # TOML has types of its own for 12:30:00 and for a moment
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


def resolve(recipe: Recipe) -> Recipe:
    """Fill the model from its preset and check what keys say together."""
    if recipe.model.preset is not None:
        fields = presets.of_layers(recipe.model.preset, recipe.model.num_hidden_layers)
        given = {name: value for name, value in dataclasses.asdict(recipe.model).items() if value is not None}
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **{**fields, **given}))
    recipe = without_idle_keys(recipe)
    check(recipe)
    return recipe


def to_tree(value: Any) -> Any:
    """Plain dicts and lists, None left out: what TOML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((item.name, getattr(value, item.name)) for item in dataclasses.fields(value) if item.name != "given")
        return {name: to_tree(inner) for name, inner in pairs if inner is not None}
    if isinstance(value, list | tuple):
        return [to_tree(item) for item in value]
    return value


def to_toml(recipe: Recipe, idle: Collection[str] = ()) -> str:
    """The complete recipe as TOML, each key with its meaning as a comment; keys that are unset or do nothing here are
    comments themselves.

    idle: keys of which only the data tells that they do nothing. What is written is a recipe that is accepted.
    """
    lines: list[str] = ["# What ran, resolved. `argonne pretrain config.toml` runs it again."]
    section = ""
    for path, item in all_keys().items():
        *parents, name = path.split(".")
        if (head := ".".join(parents)) != section:
            section = head
            lines += ["", f"[{section}]"]
        value, need = value_of(recipe, path), unmet(recipe, path)
        off = f", acts with {need or item.metadata['needs']}" if need or path in idle else ""
        meaning = f"  # {item.metadata['meaning']}{off}"
        named = '"unset"' if value is None else value == 0 and item.metadata["zero"]
        shown = named if value is None else toml_value(named or to_tree(value))
        lines.append(f"{'# ' if value is None or off else ''}{name} = {shown}{meaning}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A plain value, as of `to_tree`, the way TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {toml_value(inner)}" for name, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
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
