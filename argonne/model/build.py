"""Fields to config, config to model, config to a parameter count, and the presets as `argonne models` shows them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from argonne.errors import InputError
from argonne.model.attention import Pattern
from argonne.model.configuration_argonne import Argonne1Config, ArgonneConfig
from argonne.model.fused import Segments
from argonne.model.kernels import choose_kernel
from argonne.model.modeling_argonne import ArgonneForCausalLM
from argonne.presets import presets

RESIDUAL = ("o_proj", "down_proj")
PIECE = 1 << 24  # numbers drawn at once


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


@dataclass(frozen=True)
class Weights:
    """A model that takes no memory yet, and its tensors, whole, one at a time, so that no more of them need exist than
    are wanted here.

    model: on the meta device. tensors: (name, tensor on the CPU), once through, each layer's one after the other; a
    tied head's not.
    """

    model: ArgonneForCausalLM
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]

    @property
    def config(self) -> ArgonneConfig:
        return cast(ArgonneConfig, self.model.config)

    def of(self, names: Set[str]) -> Weights:
        """Those tensors alone; the modules of others may be taken out of the model."""
        return replace(self, tensors=lambda: (pair for pair in self.tensors() if pair[0] in names))

    @torch.no_grad()
    def fill(
        self, device: torch.device | str, ended: Callable[[nn.Module], object] = lambda layer: None
    ) -> ArgonneForCausalLM:
        """The model with its tensors on a device. `ended` is called with each decoder layer once it has all of its own,
        and may take them apart.
        """
        for layer, tensors in itertools.groupby(self.tensors(), lambda pair: layer_of(pair[0])):
            for name, tensor in tensors:
                owner, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device)))
            if layer:
                ended(self.model.get_submodule(layer))
        if isinstance(self.model.lm_head, nn.Linear):  # a head that was taken out is not tied
            self.model.tie_weights()
        return self.model


def layer_of(name: str) -> str:
    """The decoder layer whose parameter this is, "" where it is none's."""
    match = re.match(r"model\.layers\.\d+", name)
    return match[0] if match else ""


def empty_model(config: ArgonneConfig) -> ArgonneForCausalLM:
    """A model on the meta device, its head tied where the config says so."""
    with torch.device("meta"):
        model = ArgonneForCausalLM(config)
    model.tie_weights()
    return model


def build_model(
    config: ArgonneConfig,
    *,
    initializer: str = "scaled",
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ArgonneForCausalLM:
    """A fresh model, see `fresh_weights`."""
    return fresh_weights(config, initializer=initializer, seed=seed, dtype=dtype).fill(device)


def fresh_weights(
    config: ArgonneConfig, *, initializer: str = "scaled", seed: int, dtype: torch.dtype = torch.float32
) -> Weights:
    """Weights that depend on the seed and the config alone, not on the global random state or the device.

    They are drawn in the order of the modules' names. scaled: normal 0.02, residual output projections 0.02 / sqrt(2 L)
    (GPT-2). argonne: the earlier code's widths, normal H^-0.5 and (2 L)^-0.5 for the residual ones (1.x: 0.02
    everywhere). Norms 1, biases 0.
    """
    if initializer not in ("scaled", "argonne"):
        raise InputError(f"model.initializer is {initializer!r}; expected scaled or argonne")
    model = empty_model(config)
    depth = 2 * config.num_hidden_layers
    first_generation = isinstance(config, Argonne1Config)
    std = config.initializer_range if initializer == "scaled" or first_generation else config.hidden_size**-0.5
    residual = std / math.sqrt(depth) if initializer == "scaled" else (std if first_generation else depth**-0.5)

    modules = sorted(model.named_modules())  # all of them, also where some are taken out before they are filled

    def tensors() -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for name, module in modules:
            if name == "lm_head" and config.tie_word_embeddings:
                continue
            for leaf, parameter in module.named_parameters(recurse=False):
                tensor = torch.zeros(parameter.shape, dtype=dtype)
                if leaf == "weight" and isinstance(module, nn.Linear | nn.Embedding):
                    _draw(tensor, residual if name.rsplit(".", 1)[-1] in RESIDUAL else std, generator)
                elif leaf == "weight":
                    tensor.fill_(1.0)
                yield f"{name}.{leaf}", tensor

    return Weights(model, tensors)


def _draw(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with normal numbers as fp32 has them, in pieces: of a large table no copy in fp32 need exist. Pieces of
    whole blocks of 16 give what one draw gives.
    """
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), PIECE):
        end = flat.numel() if flat.numel() - start < 2 * PIECE else start + PIECE
        piece = torch.empty(end - start)
        flat[start:end] = piece.normal_(0.0, std, generator=generator)
        if end == flat.numel():
            break


def check_attention(
    config: ArgonneConfig,
    device: torch.device,
    kernel: str,
    dtype: torch.dtype,
    *,
    documents: bool = False,
    part: bool = False,
) -> set[str]:
    """The kernels that train a model on a device in `dtype`. Raises InputError when one that a recipe forces
    cannot, before anything runs.

    documents: rows will be packed with a document mask. part: each rank will hold a part of its rows' tokens.
    """
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    query, key, value = (
        torch.empty(1, heads, 4, config.head_dim, device=device, dtype=dtype, requires_grad=True) for heads in sizes
    )
    segments = Segments.of(torch.tensor([0, 2, 4]), 4, device) if documents else None
    try:
        plans = [Pattern(window, segments) for window in {None, config.sliding_window}]
        if part:
            plans = [Pattern(dense=torch.ones(1, 1, 4, 4, dtype=torch.bool, device=device))]
        return {choose_kernel(kernel, query, key, value, pattern, config.attention_dropout) for pattern in plans}
    except ValueError as error:
        raise InputError(f"train.attention: {error}") from None


def count_parameters(config: ArgonneConfig) -> int:
    """Parameters of the real modules, made on the meta device; a tied head counts once."""
    return int(empty_model(config).num_parameters())


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
