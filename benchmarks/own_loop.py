"""Recipes of the shapes that benchmarks compare; `argonne.stages.trial` times them through the project's own loop."""

from __future__ import annotations

from typing import Any

from argonne.config import Recipe
from argonne.recipe import build, resolve


def make_recipe(preset: str, shape: dict[str, int], **train: Any) -> Recipe:
    """The preset with the shape's sizes; 3.0 keeps its window (256 at full size, a quarter of the length here) on odd
    layers.
    """
    fields = {
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape.get("head_dim", shape["hidden"] // shape["heads"]),
        "intermediate_size": shape["mlp"],
        "max_position_embeddings": shape["length"],
    }
    if preset.endswith("3.0"):
        fields["sliding_window"] = shape.get("window", shape["length"] // 4)
    tree = {
        "model": {"preset": preset, **fields},
        "data": {"sequence_length": shape["length"]},
        "batch": {"tokens_per_step": shape["rows"] * shape["length"], "micro": shape.get("micro", shape["rows"])},
        "optim": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "grad_clip": 1.0},
        "schedule": {"kind": "constant"},
        "train": {"steps": 1_000_000, "precision": "fp32", **train},
        "log": {"every_steps": 1_000_000, "tensorboard": False},
        "checkpoint": {"every_minutes": 0.0},
    }
    recipe: Recipe = resolve(build(Recipe, tree))
    return recipe
