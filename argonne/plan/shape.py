"""Which model a run trains, for plan, dry run and training alike: what the recipe says, then the weights that training
starts with, then the data's tokenizer, and a preset last. And what it comes to: sizes, exact parameters, FLOPs a token,
by pure arithmetic that the tests hold against the real modules; which context a base of rotary positions carries.

FLOPs convention. One multiply-add is 2 FLOPs; the backward pass costs twice the forward one, so training is 3 times the
forward pass. Counted: every matrix product with a weight, the head included (6 FLOPs a weight and token), and
attention's two products over the keys a query really sees: (T + 1) / 2 on average with the causal mask, fewer under a
window. Not counted: embedding look-up, norms, activations, softmax, and whatever activation checkpointing recomputes.
Document masks are ignored, so with them the figure is an upper bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from argonne import files, layout, presets
from argonne.config import CHAT_STAGES, DataSection, ModelSection, Recipe
from argonne.errors import InputError
from argonne.keys import without_idle_keys
from argonne.layout import CONTENT_TOKENS, THINK_TOKENS, TURN_TOKENS

ARCHITECTURE = tuple(
    item.name for item in dataclasses.fields(ModelSection) if item.name not in ("preset", "init_from", "initializer")
)
# What may differ from the weights that training starts with: every tensor keeps its shape and its meaning.
CHANGEABLE = (
    *("max_position_embeddings", "rope_theta", "layer_types", "sliding_window"),
    *("attention_dropout", "hidden_dropout", "rms_norm_eps", "final_logit_softcapping"),
)
_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class ModelShape:
    """The sizes and switches of one model, every default filled in. Sizes in elements, the window in keys."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    position_embedding: str
    norm_type: str
    mlp_gated: bool
    attention_bias: bool
    mlp_bias: bool
    attention_dropout: float
    hidden_dropout: float
    tie_word_embeddings: bool
    q_norm: bool
    k_norm: bool
    v_norm: bool
    sandwich_norm: bool
    layer_types: tuple[str, ...]
    sliding_window: int | None
    final_logit_softcapping: float | None

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's attention projections, without biases."""
        return self.hidden_size * (2 * self.query_width + 2 * self.key_width)

    @property
    def mlp_weights(self) -> int:
        """Weights of one layer's MLP, without biases."""
        return (3 if self.mlp_gated else 2) * self.hidden_size * self.intermediate_size

    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: projections, biases and gains."""
        norm = self.hidden_size * (2 if self.norm_type == "layer" else 1)
        attention_bias = self.query_width + 2 * self.key_width + self.hidden_size if self.attention_bias else 0
        mlp_bias = (2 if self.mlp_gated else 1) * self.intermediate_size + self.hidden_size if self.mlp_bias else 0
        gains = self.head_dim * (self.q_norm + self.k_norm + self.v_norm)
        return (
            self.attention_weights
            + attention_bias
            + self.mlp_weights
            + mlp_bias
            + gains
            + norm * (4 if self.sandwich_norm else 2)
        )

    def parameters(self) -> int:
        """Parameters of the whole model; a head that shares the embedding's weight is counted once."""
        embedding = self.vocab_size * self.hidden_size
        positions = self.max_position_embeddings * self.hidden_size if self.position_embedding == "learned" else 0
        head = 0 if self.tie_word_embeddings else embedding
        norm = self.hidden_size * (2 if self.norm_type == "layer" else 1)
        return embedding + positions + self.num_hidden_layers * self.layer_parameters() + norm + head

    def windows(self) -> list[int | None]:
        """Keys a query sees at most, by layer; None where it sees all before it."""
        return [self.sliding_window if kind == presets.SLIDING else None for kind in self.layer_types]

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs a token, forward and backward, at this row length (convention: the module's docstring)."""
        weights = (
            self.num_hidden_layers * (self.attention_weights + self.mlp_weights) + self.vocab_size * self.hidden_size
        )
        keys = sum(mean_keys(sequence_length, window) for window in self.windows())
        return 6.0 * weights + 12.0 * self.query_width * keys


def mean_keys(sequence_length: int, window: int | None) -> float:
    """Keys a query sees on average over a row, itself included: query i (from 1) sees min(i, window)."""
    if window is None or window >= sequence_length:
        return (sequence_length + 1) / 2
    return (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length


def flops_per_token(model: ModelSection | Mapping[str, Any], sequence_length: int) -> float:
    """Training FLOPs a token of a recipe's model section, or of a config.json read as a dict."""
    return shape_of(model, sequence_length).flops_per_token(sequence_length)


def shape_of(model: ModelSection | Mapping[str, Any], sequence_length: int = 0) -> ModelShape:
    """The sizes of a model section (or a config.json as a dict), for rows of `sequence_length` tokens. Raises
    InputError where a size is missing, or two fields contradict each other.
    """
    given = asdict(model) if isinstance(model, ModelSection) else model
    fields = {name: value for name, value in given.items() if value is not None}
    for name in _NEEDED:
        if not isinstance(fields.get(name), int):
            raise InputError(
                f"model.{name}: not set, and neither model.preset nor model.init_from gives it; add one of them"
            )
    presets.check(fields)
    full = presets.filled(fields)
    full["max_position_embeddings"] = max(full["max_position_embeddings"], sequence_length)
    return ModelShape(**{name: full[name] for name in ModelShape.__dataclass_fields__})


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
    if recipe.stage not in CHAT_STAGES:
        return fitted(recipe, vocabulary_of(recipe.data), weights)
    places = [Path(recipe.data.tokenizer)] if recipe.data.tokenizer else _model_places(start or "")
    folder = next(filter(None, map(layout.tokenizer_of, places)), None)
    if folder is None:
        return fitted(recipe, None, weights)
    ids = _ids_of(folder)
    before = 1 + max(ids.values())
    vocabulary = before + len(missing_chat_tokens(recipe, ids))
    return fitted(recipe, vocabulary, weights and with_new_tokens(weights, range(before, vocabulary)))


def missing_chat_tokens(recipe: Recipe, known: Container[str]) -> list[str]:
    """What a stage of conversations adds to a tokenizer in which no turn could end, or no trace where there are some:
    then whatever a conversation may hold, so that no later stage has to add any.
    """
    needed = (*TURN_TOKENS, *(THINK_TOKENS if recipe.stage == "cot-sft" else ()))
    if recipe.stage not in CHAT_STAGES or recipe.chat.template != "chatml" or all(token in known for token in needed):
        return []
    return [token for token in (*TURN_TOKENS, *CONTENT_TOKENS) if token not in known]


def with_new_tokens(weights: Mapping[str, Any], ids: range) -> dict[str, Any]:
    """The fields of the weights once their table has rows for these ids. One that is shorter than what comes before
    them is no table of this tokenizer, and stays as it is, to be refused.
    """
    rows = weights["vocab_size"]
    return {**weights, "vocab_size": max(rows, ids.stop) if rows >= ids.start else rows}


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
    sizes = shape_of(model)
    check_rope(model, sizes.head_dim, sizes.max_position_embeddings)
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
    for folder in _model_places(path):
        if (folder / layout.MODEL_CONFIG).is_file():
            return architecture_of(files.read_json(folder / layout.MODEL_CONFIG), folder)
    return None


def _model_places(path: str) -> list[Path]:
    place = Path(path).expanduser()
    return [folder for folder in (place, layout.model_of_run(place)) if folder is not None]


def architecture_of(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Every field that a config.json of the family says, named as the recipe's [model] section does; `folder`: its
    place, for the error where it has no sizes.
    """
    kind = "learned" if config.get("model_type") == "argonne" else "rope"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (scaling := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise InputError(
            f"{folder / layout.MODEL_CONFIG}: rope_parameters.rope_type is {scaling!r}, and a recipe knows "
            "model.rope_theta only; start from weights whose positions are not scaled"
        )
    theta = rope.get("rope_theta", config.get("rope_theta"))
    known = {"position_embedding": kind, **config, "rope_theta": theta}
    if missing := [name for name in _NEEDED if not isinstance(known.get(name), int)]:
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
    return None if folder is None else 1 + max(_ids_of(folder).values())


def _ids_of(folder: Path) -> dict[str, int]:
    """Every token of a tokenizer's folder, added ones too, and its id, as the library gives them: an added token that
    is no entry gets the count so far, whatever id the file says.
    """
    if not (folder / layout.TOKENIZER_FILE).is_file():
        return dict(files.read_json(folder / layout.VOCABULARY))
    tree = files.read_json(folder / layout.TOKENIZER_FILE)
    entries = tree["model"]["vocab"]
    if not isinstance(entries, dict):  # a unigram model lists its entries, the others give each its id
        entries = {entry[0]: number for number, entry in enumerate(entries)}
    ids = dict(entries)
    for token in tree.get("added_tokens", []):
        ids.setdefault(token["content"], len(ids))
    return ids


def longest_wavelength(theta: float, head_dim: int) -> float:
    """Tokens after which the slowest pair of a rotary head has turned once; beyond, every pair shows angles a second
    time (the aliasing bound of arXiv 2602.10959). Pair i of a head of d dimensions turns by theta^(-2i/d) a token.
    """
    return 2 * math.pi * theta ** ((head_dim - 2) / head_dim)


def discerned(theta: float, head_dim: int, context: int) -> int:
    """Up to which distance, at most `context`, attention can prefer a similar token to a random one: the first distance
    m at which the sum of cos(m theta^(-2i/d)) over all pairs i is negative ("Base of RoPE Bounds Context Length",
    arXiv 2405.14591).
    """
    turns = [theta ** (-pair / head_dim) for pair in range(0, head_dim, 2)]
    away = (m for m in range(context) if sum(math.cos(m * turn) for turn in turns) < 0)
    return next(away, context)


def check_rope(model: ModelSection, head_dim: int, context: int) -> None:
    """Raise InputError where even the slowest pair turns more than once within the context: then no pair tells a token
    from one a turn away.
    """
    theta = _theta(model, head_dim)
    if theta is None or (reach := longest_wavelength(theta, head_dim)) >= context:
        return
    least = (context / (2 * math.pi)) ** (head_dim / (head_dim - 2))
    raise InputError(
        f"model.rope_theta: found {theta:g}, whose longest wavelength with heads of {head_dim} is {reach:,.0f} tokens, "
        f"and a context of {context:,}: positions would repeat; give at least {math.ceil(least):,}, or a shorter "
        "context (model.max_position_embeddings, data.sequence_length)"
    )


def short_base(model: ModelSection, head_dim: int, context: int) -> str | None:
    """What to know of a base below the paper's bound for the context; None for one above it."""
    theta = _theta(model, head_dim)
    if theta is None or (found := discerned(theta, head_dim, context)) == context:
        return None
    return (
        f"model.rope_theta {theta:g} tells similar tokens from others up to a distance of {found:,}, and the context "
        f"is {context:,} (arXiv 2405.14591); a higher base reaches further"
    )


def _theta(model: ModelSection, head_dim: int) -> float | None:
    """None where nothing is turned, or by a single pair, of which no base makes a slow one."""
    turned = model.position_embedding != "learned" and head_dim > 2
    return float(model.rope_theta or presets.DEFAULTS["rope_theta"]) if turned else None
