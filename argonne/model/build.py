"""Fields to config, config to model, config to a parameter count, and the presets as `argonne models` shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from argonne.errors import InputError
from argonne.model.attention import Pattern
from argonne.model.configuration_argonne import Argonne1Config, ArgonneConfig
from argonne.model.fused import Segments
from argonne.model.kernels import choose_kernel
from argonne.model.modeling_argonne import ArgonneForCausalLM
from argonne.presets import presets

RESIDUAL = ("o_proj", "down_proj")


def config_from_fields(fields: Mapping[str, Any]) -> ArgonneConfig:
    """A config from a recipe's [model] fields, None = unset. Learned positions make it an Argonne1Config.

    Raises InputError when the fields contradict each other.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if "layer_types" in given:
        given["layer_types"] = list(given["layer_types"])
    kind = Argonne1Config if given.get("position_embedding") == "learned" else ArgonneConfig
    theta = given.pop("rope_theta", None)
    if theta is not None and kind is ArgonneConfig:
        given["rope_parameters"] = {"rope_type": "default", "rope_theta": float(theta)}
    unknown = sorted(name for name in given if not hasattr(kind, name))
    if unknown:
        raise InputError(
            f"model.{unknown[0]}: no such field of the architecture; `argonne models` and docs/model.md name them"
        )
    try:
        return kind(**given)
    except ValueError as error:
        raise InputError(f"model: {error}") from None


@torch.no_grad()
def build_model(
    config: ArgonneConfig,
    *,
    initializer: str = "scaled",
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ArgonneForCausalLM:
    """A fresh model whose weights depend on the seed and the config alone, not on the global random state or the
    device.

    They are filled in the order of the parameters' names. scaled: normal 0.02, residual output projections 0.02 /
    sqrt(2 L) (GPT-2). argonne: the earlier code's widths, normal H^-0.5 and (2 L)^-0.5 for the residual ones (1.x: 0.02
    everywhere). Norms 1, biases 0.
    """
    if initializer not in ("scaled", "argonne"):
        raise InputError(f"model.initializer is {initializer!r}; expected scaled or argonne")
    with torch.device("meta"):
        model = ArgonneForCausalLM(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    depth = 2 * config.num_hidden_layers
    first_generation = isinstance(config, Argonne1Config)
    std = config.initializer_range if initializer == "scaled" or first_generation else config.hidden_size**-0.5
    residual = std / math.sqrt(depth) if initializer == "scaled" else (std if first_generation else depth**-0.5)
    for name, module in sorted(model.named_modules()):
        if name == "lm_head" and config.tie_word_embeddings:
            continue
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, residual if name.rsplit(".", 1)[-1] in RESIDUAL else std, generator=generator)
        elif getattr(module, "weight", None) is not None:
            module.weight.fill_(1.0)
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
    nn.Module.to(model, device=device, dtype=dtype)
    return model


def check_attention(model: ArgonneForCausalLM, kernel: str, dtype: torch.dtype, *, documents: bool = False) -> set[str]:
    """The kernels that train this model on its device in `dtype`. Raises InputError when one that a recipe forces
    cannot, before anything runs.

    documents: rows will be packed with a document mask.
    """
    config, device = model.config, model.device
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    query, key, value = (
        torch.empty(1, heads, 4, config.head_dim, device=device, dtype=dtype, requires_grad=True) for heads in sizes
    )
    segments = Segments.of(torch.tensor([0, 2, 4]), 4, device) if documents else None
    try:
        plans = [Pattern(window, segments) for window in {None, config.sliding_window}]
        return {choose_kernel(kernel, query, key, value, pattern, config.attention_dropout) for pattern in plans}
    except ValueError as error:
        raise InputError(f"train.attention: {error}") from None


def count_parameters(config: ArgonneConfig) -> int:
    """Parameters of the real modules, made on the meta device; a tied head counts once."""
    with torch.device("meta"):
        model = ArgonneForCausalLM(config)
    model.tie_weights()
    return int(model.num_parameters())


def describe_presets() -> list[dict[str, Any]]:
    """One dictionary a preset; `parameters` is counted from real modules on the meta device."""
    rows = []
    for preset in presets().values():
        config = config_from_fields(preset.fields)
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
