"""What a [model] section means where it leaves fields open, and what in it cannot be: for recipes, presets and plans, which load no torch.

`argonne/model/configuration_argonne.py` says the same once more: it ships with every checkpoint and must stand alone, and transformers copies no
file from outside its folder. `tests/test_architecture.py` holds the two together, field by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from argonne.errors import InputError

Fields = dict[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"

# 2.0 and later. `final_logit_softcapping` 0 is none.
DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 1024,
    "position_embedding": "rope",
    "rope_theta": 1e4,
    "norm_type": "rms",
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "mlp_gated": True,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": True,
    "q_norm": False,
    "k_norm": False,
    "v_norm": False,
    "sandwich_norm": False,
    "sliding_window": None,
    "final_logit_softcapping": 0.0,
}
# 1.x, which learned positions stand for.
DEFAULTS_LEARNED: Mapping[str, Any] = {
    **DEFAULTS,
    "max_position_embeddings": 2048,
    "position_embedding": "learned",
    "norm_type": "layer",
    "rms_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "mlp_gated": False,
    "attention_bias": True,
    "mlp_bias": True,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "tie_word_embeddings": False,
}


def filled(fields: Mapping[str, Any]) -> Fields:
    """Every field of an architecture. `fields`: those that are set, hidden_size, num_hidden_layers and num_attention_heads among them."""
    defaults = DEFAULTS_LEARNED if fields.get("position_embedding") == "learned" else DEFAULTS
    full = {**defaults, **{name: value for name, value in fields.items() if value is not None}}
    hidden, heads = full["hidden_size"], full["num_attention_heads"]
    full.setdefault("num_key_value_heads", heads)
    full.setdefault("head_dim", hidden // heads)
    full.setdefault("intermediate_size", -(-int(8 * hidden / 3) // 256) * 256 if full["mlp_gated"] else 4 * hidden)
    full["layer_types"] = tuple(full.get("layer_types") or [FULL] * full["num_hidden_layers"])
    if SLIDING not in full["layer_types"]:
        full["sliding_window"] = None
    full["final_logit_softcapping"] = full["final_logit_softcapping"] or None
    return full


def check(fields: Mapping[str, Any]) -> None:
    """Raise InputError naming the first of the fields that are set which the others contradict."""
    heads, shared, hidden, width = (fields.get(name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim"))
    if heads and shared and heads % shared:
        raise InputError(f"model.num_attention_heads: found {heads}, expected a multiple of model.num_key_value_heads = {shared}")
    if heads and hidden and width is None and hidden % heads:
        raise InputError(
            f"model.num_attention_heads: {heads} does not divide model.hidden_size = {hidden}; choose another or give model.head_dim"
        )
    if width and width % 2 and fields.get("position_embedding") == "rope":
        raise InputError(f"model.head_dim: found {width}, expected an even number with rotary positions")
    if (kinds := fields.get("layer_types")) is not None:
        _check_layers(kinds, fields.get("num_hidden_layers"), fields.get("sliding_window"))


def _check_layers(kinds: Any, layers: int | None, window: int | None) -> None:
    if layers != len(kinds):
        raise InputError(f"model.layer_types: found {len(kinds)} entries, expected model.num_hidden_layers = {layers}")
    if unknown := set(kinds) - {FULL, SLIDING}:
        raise InputError(f"model.layer_types: found {sorted(unknown)}, expected {FULL} or {SLIDING}")
    if SLIDING in kinds and not window:
        raise InputError("model.sliding_window: not set, and model.layer_types has sliding layers")
