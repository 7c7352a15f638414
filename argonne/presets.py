"""The generations by name. Pure data, so that `plan` and `argonne models` can read it without torch.

Sizes are those of `docs/model.md`; `parameters` is the published total (None where none was published) and is checked against the modules.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from argonne.architecture import DEFAULTS, DEFAULTS_LEARNED, FULL, SLIDING, Fields
from argonne.errors import InputError


@dataclass(frozen=True)
class Preset:
    """One model of the family: the fields of a recipe's [model] section, and the facts of its release."""

    name: str
    fields: Fields
    parameters: int | None = None
    status: str = "released"
    tokenizer: str | None = None


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
    Preset("argonne-1.0", _sized(_FIRST, 12_000, 1_296, 12, (12, 12), 108, 5_184, 2_048), 275_827_680, tokenizer="own BPE"),
    Preset("argonne-1.5", _sized(_FIRST, 12_000, 1_296, 16, (16, 16), 81, 5_184, 2_048), 356_516_640, tokenizer="own BPE"),
    Preset("argonne-2.0", _sized(_SECOND, 151_665, 4_080, 24, (24, 8), 170, 11_008, 4_096), 4_918_072_800, "not released", "Qwen2.5"),
    Preset(
        "argonne-2.0-early",
        _sized(_SECOND, 151_665, 4_096, 24, (24, 8), 170, 11_008, 4_096, rope_theta=5e5, tie_word_embeddings=False),
        5_558_579_200,
        "not released",
        "Qwen2.5",
    ),
    # Its documents say "about 8B"; these sizes make 16.2B.
    Preset("argonne-2.0-plan", _sized(_SECOND, 151_936, 5_120, 56, (40, 8), 128, 13_824, 4_096), None, "never trained", "Qwen2.5"),
    Preset("argonne-2.5", _sized(_SECOND, 151_669, 1_792, 28, (14, 7), 128, 4_864, 1_024), 1_273_807_360, tokenizer="Qwen3"),
    Preset("argonne-3.0", _sized(_THIRD, 151_669, 3_072, 24, (12, 4), 256, 8_192, 1_024, window=256), 2_882_162_688, tokenizer="Qwen3"),
    Preset("argonne-4.0", _sized(_THIRD, 151_669, 1_536, 32, (6, 2), 256, 4_096, 13_568), 1_038_492_672, tokenizer="Qwen3"),
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
