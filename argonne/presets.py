"""The generations by name, what a [model] section means where it leaves fields open, and what in it cannot be. No
torch.

Sizes are those of `docs/model.md`; `parameters` is the published total (None where none was published) and is checked
against the modules. `argonne/model/configuration_argonne.py` says defaults and checks once more: it ships with every
checkpoint and must stand alone, and transformers copies no file from outside its folder. `tests/test_presets.py` holds
the two together, field by field.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Preset:
    """One model of the family: the fields of a recipe's [model] section, and the facts of its release. `release`: the
    name it goes by there; `hub`: its id on the Hugging Face Hub. None where it has none, or where it is not known.
    """

    name: str
    fields: Fields
    parameters: int | None = None
    status: str = "released"
    tokenizer: str | None = None
    release: str | None = None
    hub: str | None = None


_FIRST, _SECOND = DEFAULTS_LEARNED, DEFAULTS
_THIRD: Fields = {
    **_SECOND,
    "rope_theta": 1e6,
    "q_norm": True,
    "k_norm": True,
    "v_norm": True,
    "sandwich_norm": True,
    "final_logit_softcapping": 15.0,
}


def _sized(
    base: Mapping[str, Any],
    vocabulary: int,
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    head_dim: int,
    mlp: int,
    context: int,
    **other: Any,
) -> Fields:
    """A generation's fields with its sizes. `window`: odd layers are local with this window."""
    window = other.pop("window", None)
    local = FULL if window is None else SLIDING
    return {
        **base,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim,
        "intermediate_size": mlp,
        "max_position_embeddings": context,
        "layer_types": tuple(local if layer % 2 else FULL for layer in range(layers)),
        "sliding_window": window,
        **other,
    }


_PRESETS = (
    Preset(
        "argonne-1.0",
        _sized(_FIRST, 12_000, 1_296, 12, (12, 12), 108, 5_184, 2_048),
        275_827_680,
        tokenizer="own BPE",
        release="Argonne 1.0",
        hub="PursuitOfDataScience/Argonne-1.0",
    ),
    Preset(
        "argonne-1.5",
        _sized(_FIRST, 12_000, 1_296, 16, (16, 16), 81, 5_184, 2_048),
        356_516_640,
        tokenizer="own BPE",
        release="Argonne 1.5",
        hub="PursuitOfDataScience/Argonne-1.5",
    ),
    Preset(
        "argonne-2.0",
        _sized(_SECOND, 151_665, 4_080, 24, (24, 8), 170, 11_008, 4_096),
        4_918_072_800,
        "not released",
        "Qwen2.5",
        "Argonne 2.0",
    ),
    Preset(
        "argonne-2.0-early",
        _sized(_SECOND, 151_665, 4_096, 24, (24, 8), 170, 11_008, 4_096, rope_theta=5e5, tie_word_embeddings=False),
        5_558_579_200,
        "not released",
        "Qwen2.5",
    ),
    # Its documents say "about 8B"; these sizes make 16.2B.
    Preset(
        "argonne-2.0-plan",
        _sized(_SECOND, 151_936, 5_120, 56, (40, 8), 128, 13_824, 4_096),
        None,
        "never trained",
        "Qwen2.5",
    ),
    Preset(
        "argonne-2.5",
        _sized(_SECOND, 151_669, 1_792, 28, (14, 7), 128, 4_864, 1_024),
        1_273_807_360,
        tokenizer="Qwen3",
        release="Argonne 2.5",
        hub="PursuitOfDataScience/Argonne2.5-base",
    ),
    Preset(
        "argonne-3.0",
        _sized(_THIRD, 151_669, 3_072, 24, (12, 4), 256, 8_192, 1_024, window=256),
        2_882_162_688,
        tokenizer="Qwen3",
        release="Argonne 3.0",
        hub="PursuitOfDataScience/argonne-3.0-base",
    ),
    Preset(
        "argonne-4.0",
        _sized(_THIRD, 151_669, 1_536, 32, (6, 2), 256, 4_096, 13_568),
        1_038_492_672,
        tokenizer="Qwen3",
        release="Argonne 4.0",
    ),
    Preset("nano-1.0", _sized(_FIRST, 2_048, 128, 4, (4, 4), 32, 512, 256), None, "demo"),
    Preset("nano-2.5", _sized(_SECOND, 2_048, 128, 4, (4, 2), 32, 384, 256), None, "demo"),
    Preset("nano-3.0", _sized(_THIRD, 2_048, 128, 4, (4, 2), 32, 384, 256, window=64), None, "demo"),
)


def presets() -> dict[str, Preset]:
    return {preset.name: preset for preset in _PRESETS}


def preset(name: str) -> Preset:
    """The preset of this name. Raises InputError with the nearest names."""
    known = presets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"model.preset: no preset {name!r}; {hint}`argonne models` lists them: {', '.join(known)}")
    return known[name]


def of_layers(name: str, layers: int | None) -> Fields:
    """What the preset `name` says of a model of this many layers (None: its own): its pattern goes on, or ends."""
    fields = preset(name).fields
    kinds = fields["layer_types"]
    return {**fields, "layer_types": tuple(kinds[layer % len(kinds)] for layer in range(layers or len(kinds)))}


def filled(fields: Mapping[str, Any]) -> Fields:
    """Every field of an architecture. `fields`: those that are set, hidden_size, num_hidden_layers and
    num_attention_heads among them.
    """
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
    heads, shared, hidden, width = (
        fields.get(name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    )
    if heads and shared and heads % shared:
        raise InputError(
            f"model.num_attention_heads: found {heads}, expected a multiple of model.num_key_value_heads = {shared}"
        )
    if heads and hidden and width is None and hidden % heads:
        raise InputError(
            f"model.num_attention_heads: {heads} does not divide model.hidden_size = {hidden}; choose another or give "
            "model.head_dim"
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
