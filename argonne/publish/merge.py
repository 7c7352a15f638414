"""`argonne merge`: the weighted average of models of one shape and one tokenizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from argonne import layout
from argonne.errors import InputError
from argonne.files import atomic_directory, write_json
from argonne.model.load import LoadedModel, identity_of, load_model, resolve_model
from argonne.model.save import copy_tokenizer, save_model_folder
from argonne.model.stored import check_finite
from argonne.tokens.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Part:
    """A model and its weight in the average."""

    name: str
    weight: float


def parse_parts(words: Sequence[str]) -> list[Part]:
    """`MODEL:WEIGHT` of each. Raises InputError where a weight is missing or none, or they do not sum to 1."""
    parts = []
    for word in words:
        name, _, weight = word.rpartition(":")
        try:
            parts.append(Part(name, float(weight)))
        except ValueError:
            raise InputError(f"{word}: has no weight; give MODEL:WEIGHT, such as {word}:0.5") from None
        if not name or not math.isfinite(parts[-1].weight):
            raise InputError(f"{word}: expected MODEL:WEIGHT with a finite number")
    total = sum(part.weight for part in parts)
    if abs(total - 1) > 1e-6:
        raise InputError(f"the weights sum to {total:g}, expected 1: an average of other sums has another scale")
    return parts


@dataclass(frozen=True)
class Mixer:
    """Models of one shape, opened once, the weights of which are averaged again and again. `template`: the chat
    template of the average.
    """

    names: Sequence[str]
    first: LoadedModel
    states: Sequence[dict[str, torch.Tensor]]
    template: str | None

    def mix(self, weights: Sequence[float]) -> LoadedModel:
        """The average, in the first model's place and dtype; sums are kept in float64, so that a single model of weight
        1 comes back bit for bit.
        """
        with torch.no_grad():
            for name, tensor in self.first.model.state_dict().items():
                if tensor.is_floating_point():
                    parts = zip(weights, self.states, strict=True)
                    tensor.copy_(sum(weight * state[name].double() for weight, state in parts if weight))
        return self.first

    def save(self, out: Path, weights: Sequence[float]) -> dict[str, Any]:
        """Write the average as a model folder, atomically, with what it was made of."""
        model = self.mix(weights).model
        check_finite("the average", model.state_dict())
        ids = {f"{name}_id": getattr(model.config, f"{name}_token_id") for name in ("eos", "bos", "pad")}
        listed = zip(self.names, weights, strict=True)
        record = {
            "merged": [{"model": name, "weight": weight, **identity_of(resolve_model(name))} for name, weight in listed]
        }
        with atomic_directory(out) as folder:
            save_model_folder(model, folder, **ids)
            copy_tokenizer(self.first.tokenizer_folder, folder)
            if self.template is not None:
                (folder / layout.CHAT_TEMPLATE).write_text(self.template, encoding="utf-8")
            write_json(folder / layout.MERGE_RECORD, record)
        return {"out": str(out), **record}


def open_mixer(names: Sequence[str]) -> Mixer:
    """Raises InputError for models of other shapes, tokenizers or chat templates, or with weights that are not
    finite.
    """
    if len(names) < 2:
        raise InputError(f"merge: found {len(names)} model, expected two or more")
    if len({resolve_model(name).folder.resolve() for name in names}) < len(names):
        raise InputError(f"merge: {', '.join(names)}: a model is named twice; give its weight once, as a sum")
    loaded = [load_model(name) for name in names]
    known = [(name, each.tokenizer_folder) for name, each in zip(names, loaded, strict=True) if each.tokenizer_folder]
    # The average has the tokenizer of the first model that has one.
    first = dataclasses.replace(loaded[0], tokenizer_folder=known[0][1] if known else None)
    fields = resolve_model(names[0]).fields
    for name in names[1:]:
        its = resolve_model(name).fields
        differing = [field for field in fields if fields[field] != its[field]]
        if differing:
            field = differing[0]
            raise InputError(
                f"{name}: {field} is {its[field]}, but {fields[field]} in {names[0]}; only models of one shape have an "
                "average"
            )
    for name, folder in known[1:]:
        _check_tokenizers(*known[0], name, folder)
    for name, each in zip(names, loaded, strict=True):
        check_finite(name, each.model.state_dict())
    # The first one's place is where averages come to lie.
    own = {key: tensor.clone() for key, tensor in first.model.state_dict().items()}
    states = [own, *(dict(each.model.state_dict()) for each in loaded[1:])]
    return Mixer(names, first, states, _template(names, loaded))


def _check_tokenizers(first: str, its: Path, name: str, other: Path) -> None:
    prints = [load_tokenizer(folder).fingerprint for folder in (its, other)]
    if prints[0] != prints[1]:
        raise InputError(
            f"{name}: its tokenizer (fingerprint {prints[1][:12]}) is not that of {first} ({prints[0][:12]}): the same "
            "id means something else in each; merge models of one tokenizer"
        )


def _template(names: Sequence[str], loaded: Sequence[LoadedModel]) -> str | None:
    """The one chat template among the models; a base model has none."""
    found: dict[str, str] = {}
    for name, each in zip(names, loaded, strict=True):
        file = (each.tokenizer_folder or each.folder) / layout.CHAT_TEMPLATE
        if file.is_file():
            found.setdefault(file.read_text(encoding="utf-8"), name)
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise InputError(f"{other}: its chat template is not that of {one}; merge models that are asked alike")
    return next(iter(found), None)
