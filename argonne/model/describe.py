"""The presets as `argonne models` shows them."""

from __future__ import annotations

from typing import Any

from argonne.model.build import config_from_fields, count_parameters
from argonne.presets import presets


def describe_presets() -> list[dict[str, Any]]:
    """One dictionary a preset; `parameters` is counted from real modules on the meta device."""
    rows = []
    for preset in presets().values():
        config = config_from_fields(preset.fields)
        assert config.layer_types is not None
        rows.append(
            {
                "name": preset.name,
                "parameters": count_parameters(config),
                "layers": config.num_hidden_layers,
                "hidden": config.hidden_size,
                "heads": config.num_attention_heads,
                "kv_heads": config.num_key_value_heads,
                "head_dim": config.head_dim,
                "mlp": config.intermediate_size,
                "context": config.max_position_embeddings,
                "vocabulary": config.vocab_size,
                "window": config.sliding_window,
                "status": preset.status,
                "tokenizer": preset.tokenizer,
            }
        )
    return rows
