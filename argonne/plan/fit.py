"""Which model a run trains: what its recipe says, then the weights it starts with, then the data's tokenizer, and a
preset last. Plan, dry run and training ask here. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from argonne import files, layout, presets
from argonne.config import DataSection, ModelSection, Recipe
from argonne.errors import InputError
from argonne.keys import without_idle_keys
from argonne.plan.shape import NEEDED, shape_of

ARCHITECTURE = tuple(
    item.name for item in fields(ModelSection) if item.name not in ("preset", "init_from", "initializer")
)
# What may differ from the weights that training starts with: every tensor keeps its shape and its meaning.
CHANGEABLE = (
    *("max_position_embeddings", "rope_theta", "layer_types", "sliding_window"),
    *("attention_dropout", "hidden_dropout", "rms_norm_eps", "final_logit_softcapping"),
)


def as_trained(recipe: Recipe) -> Recipe:
    """The recipe with the model that training would give it, as far as this disk tells: where the weights or the data
    are not here, the preset's sizes stand. Raises InputError as `fitted` does, and where nothing gives the sizes.
    """
    start = recipe.model.init_from
    weights = weights_on_disk(start) if start else None
    if start and weights is None and recipe.model.hidden_size is None:
        raise InputError(
            f"model.init_from: {start} has no {layout.MODEL_CONFIG} to take the sizes from; give the right folder, or "
            "model.preset too"
        )
    return fitted(recipe, vocabulary_of(recipe.data), weights)


def fitted(recipe: Recipe, vocabulary: int | None, weights: Mapping[str, Any] | None) -> Recipe:
    """The recipe with its complete architecture, and a context of at least its longest row.

    vocabulary: entries of the data's tokenizer; None: not known. weights: the fields of those that training starts
    with; None: fresh ones. Raises InputError naming the field that contradicts either, or that is missing.
    """
    model, known = left_to(recipe, weights or {}), weights or {}
    fixed = {name: known.get(name) for name in ARCHITECTURE if name not in CHANGEABLE}
    longest = max([recipe.data.sequence_length, *(change.sequence_length or 0 for change in recipe.batch.steps)])
    model = replace(model, max_position_embeddings=max(longest, model.max_position_embeddings or 0))
    if model.position_embedding == "learned":
        fixed["max_position_embeddings"] = known.get("max_position_embeddings")
    for name, value in fixed.items():
        if value is not None and (found := getattr(model, name)) != value:
            rows = " and make no row longer" if name == "max_position_embeddings" else ""
            raise InputError(
                f"model.{name}: found {found}, but the weights that training starts with have {value}; leave it to "
                f"them{rows}, or start from others"
            )
    if vocabulary is not None:
        if "vocab_size" not in known and is_open(recipe, "vocab_size"):
            model = replace(model, vocab_size=vocabulary)
        if (model.vocab_size or 0) < vocabulary:
            raise InputError(
                f"model.vocab_size: found {model.vocab_size:,}, but the data's tokenizer has {vocabulary:,} entries; "
                f"give data of this model's tokenizer, or model.vocab_size = {vocabulary} for a fresh model"
            )
    shape_of(model)
    return without_idle_keys(replace(recipe, model=model))


def left_to(recipe: Recipe, known: Mapping[str, Any]) -> ModelSection:
    """The model section with what it leaves open as it is in `known`."""
    found: dict[str, Any] = {name: value for name, value in known.items() if is_open(recipe, name)}
    if found.get("layer_types") is not None:
        found["layer_types"] = tuple(found["layer_types"])  # a list in JSON
    return replace(recipe.model, **found)


def is_open(recipe: Recipe, name: str) -> bool:
    """Does the recipe leave this field of its model to the weights and the data? A preset's value is a default."""
    value, preset = getattr(recipe.model, name), recipe.model.preset
    if value is None or preset is None or f"model.{name}" in recipe.given:
        return value is None
    return bool(presets.of_layers(preset, recipe.model.num_hidden_layers).get(name, ()) == value)


def weights_on_disk(path: str) -> dict[str, Any] | None:
    """The architecture of a model folder, a checkpoint, or a run (its final model, else its last checkpoint)."""
    place = Path(path).expanduser()
    for folder in (place, layout.model_of_run(place)):
        if folder is not None and (folder / layout.MODEL_CONFIG).is_file():
            return architecture_of(files.read_json(folder / layout.MODEL_CONFIG), folder)
    return None


def architecture_of(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Every field that a config.json of the family says, named as the recipe's [model] section does; `folder`: its
    place, for the error where it has no sizes.
    """
    kind = "learned" if config.get("model_type") == "argonne" else "rope"
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
    known = {"position_embedding": kind, **config, "rope_theta": theta}
    if missing := [name for name in NEEDED if not isinstance(known.get(name), int)]:
        raise InputError(
            f"{folder / layout.MODEL_CONFIG}: has no {missing[0]}; of an earlier release: run `argonne import {folder} "
            "--out DIR` and start from that"
        )
    full = presets.filled(known)
    return {name: full[name] for name in ARCHITECTURE}


def vocabulary_of(data: DataSection) -> int | None:
    """Entries of the tokenizer that training would take, up to its highest id; None where it is not on this disk."""
    if not data.tokenizer:
        for source in data.sources:
            if (manifest := Path(source.path) / layout.MANIFEST).is_file():
                found = files.read_json(manifest).get("tokenizer", {}).get("vocab_size")
                return found if isinstance(found, int) else None
    # A token file of another program lies beside the folder of its tokenizer.
    beside = [Path(source.path.split(":", 1)[-1]).parent / layout.TOKENIZER for source in data.sources]
    places = [layout.tokenizer_of(place) for place in ([Path(data.tokenizer)] if data.tokenizer else beside)]
    folder = next(filter(None, places), None)
    if folder is None:
        return None
    if (folder / layout.TOKENIZER_FILE).is_file():
        tree = files.read_json(folder / layout.TOKENIZER_FILE)
        entries, added = tree["model"]["vocab"], [token["id"] for token in tree.get("added_tokens", [])]
    else:
        entries, added = files.read_json(folder / layout.VOCABULARY), []
    # A unigram model lists its entries, the others give each its id.
    return 1 + max([*added, *(entries.values() if isinstance(entries, dict) else range(len(entries)))])
