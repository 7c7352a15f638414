"""What the family's earlier trainer writes, made by torch alone: parameters in the order of its classes, its optimizer,
its scheduler.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from argonne.config import Recipe
from argonne.legacy.training import TrainingFile, read_training_file
from argonne.model.build import build_model, config_from_fields
from argonne.stages.start import architecture_fields

T, ROWS = 32, 8
# The parameters of one block of 3.0 in the order in which its class registers them, with today's names.
BLOCK_3 = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.o_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.v_norm_layer": "self_attn.v_norm",
    "input_norm": "input_layernorm",
    "post_norm": "pre_feedforward_layernorm",
    "attn_out_norm": "post_attention_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
BLOCK_2 = {
    **{name: BLOCK_3[name] for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj")},
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    **{name: BLOCK_3[name] for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")},
}
BLOCK_1 = {
    "ln1": "input_layernorm",
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.proj": "self_attn.o_proj",
    "ln2": "post_attention_layernorm",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}


def spelled_out(generation: str, layers: int = 2) -> dict[str, str]:
    """{earlier parameter: today's} in the order of `parameters()` of the generation's class."""
    block = {"1.0": BLOCK_1, "1.5": BLOCK_1, "2.5": BLOCK_2, "3.0": BLOCK_3}[generation]
    kinds = ("weight", "bias") if generation[0] == "1" else ("weight",)
    blocks = {
        f"blocks.{layer}.{old}.{kind}": f"model.layers.{layer}.{new}.{kind}"
        for layer in range(layers)
        for old, new in block.items()
        for kind in kinds
    }
    if generation[0] != "1":
        return {"embed_tokens.weight": "model.embed_tokens.weight", **blocks, "norm.weight": "model.norm.weight"}
    tables = {
        "position_embedding": "model.embed_positions.weight",
        "token_embedding.weight": "model.embed_tokens.weight",
    }
    end = {"ln_f.weight": "model.norm.weight", "ln_f.bias": "model.norm.bias", "head.weight": "lm_head.weight"}
    return {**tables, **end, **blocks} if generation == "1.0" else {**tables, **blocks, **end}


def sources(*paths: Path) -> dict[str, str]:
    return {"data.sources": f"[{', '.join(f'{{ path = {json.dumps(str(path))}, max_epochs = 9 }}' for path in paths)}]"}


def tokens_of(one_file: Path) -> np.ndarray:
    """The tokens of the train.bin, read by the format's definition: 1,024 bytes of header, then uint16 or uint32."""
    path = one_file / "train.bin"
    magic = int(np.fromfile(path, dtype="<u4", count=1)[0])
    return np.fromfile(path, dtype="<u4" if magic == 20240801 else "<u2", offset=1024)


def earlier_parameters(recipe: Recipe, generation: str, vocabulary: int = 512) -> list[nn.Parameter]:
    """Random parameters of the shapes of the recipe's model, in the earlier order; tables padded to
    `vocabulary` rows.
    """
    model = build_model(config_from_fields(architecture_fields(recipe.model)), seed=5)
    now, torch_generator = dict(model.named_parameters()), torch.Generator().manual_seed(11)
    found = []
    for old, new in spelled_out(generation).items():
        shape = list(now[new].shape)
        shape = [1, *shape] if old == "position_embedding" else shape
        shape[0] = vocabulary if shape[0] == 512 else shape[0]
        found.append(nn.Parameter(torch.randn(shape, generator=torch_generator)))
    return found


def earlier_file(
    path: Path, recipe: Recipe, generation: str = "3.0", *, steps: int = 3, vocabulary: int = 512, **content: Any
) -> dict[str, Any]:
    """What the earlier trainer saves after `steps` steps: its own torch AdamW and LambdaLR, moments of its own in every
    tensor.
    """
    parameters = earlier_parameters(recipe, generation, vocabulary)
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.1, 0.5 * (1 + np.cos(np.pi * step / 12)))
    )
    for step in range(steps):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, 0.01 * (number + 1) * (step + 1))
        optimizer.step()
        scheduler.step()
    weights = OrderedDict(zip(spelled_out(generation), (parameter.detach() for parameter in parameters), strict=True))
    if generation[0] != "1":
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    tree = {
        "global_step": steps,
        "tokens_processed": steps * ROWS * T,
        "loss": np.mean([3.0, 4.0]),
        "data_position": steps * ROWS * T,
        "model_state_dict": weights,
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        **content,
    }
    torch.save(tree, path)
    return tree


def opened(path: Path, recipe: Recipe) -> TrainingFile:
    return read_training_file(path, architecture_fields(recipe.model))
