"""The model equals independent implementations with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from argonne.model import ArgonneForCausalLM

Make = Callable[..., ArgonneForCausalLM]


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_2x_is_llama(make_model: Make, ids: torch.Tensor) -> None:
    ours = make_model("2", dtype=torch.float32)
    config = ours.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=10,
            intermediate_size=56,
            max_position_embeddings=96,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )
    ).eval()
    assert not llama.load_state_dict(ours.state_dict(), strict=True).missing_keys
    theirs = logits_of(llama, ids)
    torch.testing.assert_close(logits_of(ours, ids), theirs, rtol=0, atol=2e-6 * theirs.abs().max().item())


def test_1x_is_gpt2_with_the_erf_gelu(make_model: Make, ids: torch.Tensor) -> None:
    ours = make_model("1", hidden_size=60, intermediate_size=240)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97,
            n_embd=60,
            n_layer=4,
            n_head=6,
            n_positions=96,
            activation_function="gelu",
            tie_word_embeddings=False,
        )
    )
    gpt2 = gpt2.to(torch.float64).eval()
    state, mine = {}, ours.state_dict()
    state["transformer.wte.weight"] = mine["model.embed_tokens.weight"]
    state["transformer.wpe.weight"] = mine["model.embed_positions.weight"]
    state["lm_head.weight"] = mine["lm_head.weight"]
    for kind in ("weight", "bias"):
        state[f"transformer.ln_f.{kind}"] = mine[f"model.norm.{kind}"]
    for layer in range(4):
        here, there = f"model.layers.{layer}", f"transformer.h.{layer}"
        for kind in ("weight", "bias"):
            joined = torch.cat([mine[f"{here}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
            state[f"{there}.attn.c_attn.{kind}"] = joined.T if kind == "weight" else joined
            names = {
                "attn.c_proj": "self_attn.o_proj",
                "mlp.c_fc": "mlp.up_proj",
                "mlp.c_proj": "mlp.down_proj",
                "ln_1": "input_layernorm",
                "ln_2": "post_attention_layernorm",
            }
            for new, old in names.items():
                tensor = mine[f"{here}.{old}.{kind}"]
                state[f"{there}.{new}.{kind}"] = tensor.T if tensor.dim() == 2 else tensor
    assert not gpt2.load_state_dict(state, strict=True).missing_keys
    theirs = logits_of(gpt2, ids)
    torch.testing.assert_close(logits_of(ours, ids), theirs, rtol=0, atol=1e-12 * theirs.abs().max().item())


def third_generation_forward(weights: dict[str, np.ndarray], config: Any, ids: np.ndarray) -> np.ndarray:
    """3.0 for one row, written from its description alone, loops and all. ids (T,) -> logits (T, V)."""

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return gain * x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps)

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    length, size, half = len(ids), config.head_dim, config.head_dim // 2
    theta = config.rope_parameters["rope_theta"]
    angle = np.arange(length)[:, None] * theta ** (-np.arange(half) * 2 / size)

    def turn(x: np.ndarray) -> np.ndarray:
        low, high = x[:, :half], x[:, half:]
        return np.concatenate(
            [low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], 1
        )

    h = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):

        def w(name: str, layer: int = layer) -> np.ndarray:
            return weights[f"model.layers.{layer}.{name}.weight"]

        x = norm(h, w("input_layernorm"))
        q, k, v = (x @ w(f"self_attn.{part}_proj").T for part in "qkv")
        heads = []
        for head in range(config.num_attention_heads):
            shared = head // (config.num_attention_heads // config.num_key_value_heads)
            qh = turn(norm(q[:, head * size : (head + 1) * size], w("self_attn.q_norm")))
            kh = turn(norm(k[:, shared * size : (shared + 1) * size], w("self_attn.k_norm")))
            vh = norm(v[:, shared * size : (shared + 1) * size], w("self_attn.v_norm"))
            out = np.zeros((length, size))
            for i in range(length):
                first = max(0, i - config.sliding_window + 1) if layer % 2 else 0
                score = kh[first : i + 1] @ qh[i] / np.sqrt(size)
                p = np.exp(score - score.max())
                out[i] = (p / p.sum()) @ vh[first : i + 1]
            heads.append(out)
        h = h + norm(np.concatenate(heads, 1) @ w("self_attn.o_proj").T, w("post_attention_layernorm"))
        x = norm(h, w("pre_feedforward_layernorm"))
        x = (silu(x @ w("mlp.gate_proj").T) * (x @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
        h = h + norm(x, w("post_feedforward_layernorm"))
    logits = norm(h, weights["model.norm.weight"]) @ weights["model.embed_tokens.weight"].T
    return config.final_logit_softcapping * np.tanh(logits / config.final_logit_softcapping)


def test_3x_is_what_its_description_says(make_model: Make, ids: torch.Tensor) -> None:
    model = make_model("3-window")
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for row in range(2):
        expected = third_generation_forward(weights, model.config, ids[row].numpy())
        np.testing.assert_allclose(logits_of(model, ids)[row].numpy(), expected, rtol=0, atol=1e-11)


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "rope_theta": ("3-window", {"rope_theta": 10.0}),
    "rms_norm_eps": ("3-window", {"rms_norm_eps": 0.1}),
    "hidden_act": ("3-window", {"hidden_act": "gelu"}),
    "mlp_gated": ("3-window", {"mlp_gated": False}),
    "norm_type": ("3-window", {"norm_type": "layer"}),
    "attention_bias": ("3-window", {"attention_bias": True}),
    "mlp_bias": ("3-window", {"mlp_bias": True}),
    "tie_word_embeddings": ("3-window", {"tie_word_embeddings": False}),
    "q_norm": ("3-window", {"q_norm": False}),
    "k_norm": ("3-window", {"k_norm": False}),
    "v_norm": ("3-window", {"v_norm": False}),
    "sandwich_norm": ("3-window", {"sandwich_norm": False}),
    "layer_types": ("3-window", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
    "sliding_window": ("3-window", {"sliding_window": 10}),
    "final_logit_softcapping": ("3-window", {"final_logit_softcapping": 0.0}),
    "num_key_value_heads": ("3-window", {"num_key_value_heads": 3}),
    "position_embedding": ("1", {"position_embedding": "rope"}),
}


@pytest.mark.parametrize("field", CHANGES)
def test_every_architecture_field_moves_the_logits(field: str, make_model: Make, ids: torch.Tensor) -> None:
    generation, change = CHANGES[field]
    first, second = make_model(generation), make_model(generation, **change)
    shared = {name: value for name, value in first.named_parameters() if name in second.state_dict()}
    shared = {name: value for name, value in shared.items() if value.shape == second.state_dict()[name].shape}
    second.load_state_dict(shared, strict=False)  # what differs is the field, not the draw of the weights
    assert (logits_of(first, ids) - logits_of(second, ids)).abs().max() > 1e-4


@pytest.mark.parametrize("field", ["attention_dropout", "hidden_dropout"])
@pytest.mark.parametrize("generation", ["1", "3-window"])
def test_dropout_acts_in_training_only(field: str, generation: str, make_model: Make, ids: torch.Tensor) -> None:
    model = make_model(generation, **{field: 0.2})
    assert torch.equal(logits_of(model, ids), logits_of(model, ids))
    model.train()
    assert (logits_of(model, ids) - logits_of(model.eval(), ids)).abs().max() > 1e-4
