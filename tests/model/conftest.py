"""Small models that the model tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from argonne.model import ArgonneForCausalLM
from argonne.model.build import build_model, config_from_fields

FIRST: dict[str, Any] = {
    "position_embedding": "learned",
    "norm_type": "layer",
    "rms_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "mlp_gated": False,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}
THIRD: dict[str, Any] = {
    "q_norm": True,
    "k_norm": True,
    "v_norm": True,
    "sandwich_norm": True,
    "final_logit_softcapping": 15.0,
    "rope_theta": 1e6,
}
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 56,
    "max_position_embeddings": 96,
}
WINDOW: dict[str, Any] = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 9,
}
GENERATIONS: dict[str, dict[str, Any]] = {
    "1": {**SIZES, **FIRST, "num_key_value_heads": 6},
    "2": SIZES,
    "3": {**SIZES, **THIRD},
    "3-window": {**SIZES, **THIRD, **WINDOW},
}


@torch.no_grad()
def roughen(model: ArgonneForCausalLM) -> ArgonneForCausalLM:
    """Weights far from their initial values, so that gains, biases and the softcap matter."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.add_(noise * (0.3 if parameter.dim() == 1 else 0.1))
        if name == "model.norm.weight":
            parameter.mul_(4)
    return model


@pytest.fixture
def make_model() -> Callable[..., ArgonneForCausalLM]:
    """make_model("3-window", dtype=..., hidden_size=...) -> a small model with rough weights, in eval mode."""

    def make(generation: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> ArgonneForCausalLM:
        config = config_from_fields({**GENERATIONS[generation], **changes})
        return roughen(build_model(config, seed=seed, dtype=dtype)).eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(3))
