"""What a model section comes to: sizes, exact parameters, FLOPs a token. Pure arithmetic; the tests hold it against the
real modules.

FLOPs convention. One multiply-add is 2 FLOPs; the backward pass costs twice the forward one, so training is 3 times the
forward pass. Counted: every matrix product with a weight, the head included (6 FLOPs a weight and token), and
attention's two products over the keys a query really sees: (T + 1) / 2 on average with the causal mask, fewer under a
window. Not counted: embedding look-up, norms, activations, softmax, and whatever activation checkpointing recomputes.
Document masks are ignored, so with them the figure is an upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from argonne import presets
from argonne.config import ModelSection
from argonne.errors import InputError

NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


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
    for name in NEEDED:
        if not isinstance(fields.get(name), int):
            raise InputError(
                f"model.{name}: not set, and neither model.preset nor model.init_from gives it; add one of them"
            )
    presets.check(fields)
    full = presets.filled(fields)
    full["max_position_embeddings"] = max(full["max_position_embeddings"], sequence_length)
    return ModelShape(**{name: full[name] for name in ModelShape.__dataclass_fields__})
