"""A model as a class that transformers and other engines bring along: GPT-2, Llama, Mistral, Gemma 4. Exact, or refused
with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from argonne.errors import InputError
from argonne.model.configuration_argonne import FULL, SLIDING, ArgonneConfig
from argonne.model.modeling_argonne import ArgonneForCausalLM

GPT2_NAMES = {
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}


@dataclass(frozen=True)
class Native:
    """A native twin: the transformers class, its config and its weights."""

    model_class: Any
    config: Any
    state: dict[str, Tensor]


def native_twin(model: ArgonneForCausalLM) -> Native:
    """The native class that computes exactly what `model` does. Raises InputError saying what stands against each
    class.
    """
    config = model.config
    assert isinstance(config, ArgonneConfig)
    makers = (
        ("GPT2LMHeadModel", gpt2_is(config), to_gpt2),
        ("LlamaForCausalLM", llama_is(config), to_llama),
        ("MistralForCausalLM", mistral_is(config), to_mistral),
        ("Gemma4ForCausalLM", gemma4_is(config), to_gemma4),
    )
    reasons = []
    for name, holds, make in makers:
        reason = next((what for what, so in holds.items() if not so), None)
        if reason is None:
            return make(config, {key: value.detach() for key, value in model.state_dict().items()})
        reasons.append(f"{name}: {reason}")
    raise InputError(
        f"no native class computes exactly this model ({'; '.join(reasons)}); export it with --as hf, which every "
        "engine with a Transformers backend can run (vLLM: --model-impl transformers)"
    )


def has_native_twin(config: ArgonneConfig) -> bool:
    """Does a native class compute exactly such a model?"""
    return any(all(holds(config).values()) for holds in (gpt2_is, llama_is, mistral_is, gemma4_is))


def _common(config: ArgonneConfig) -> dict[str, Any]:
    """Config fields that Llama, Mistral and Gemma 4 name as we do."""
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
    names += [
        "intermediate_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "initializer_range",
    ]
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: getattr(config, name) for name in names} | ids


# --- 1.x
# ----------------------------------------------------------------------------------------------------


def gpt2_is(config: ArgonneConfig) -> dict[str, bool]:
    """What a class is -> whether this model is so too; the same for the other classes below."""
    return {
        "its positions are learned, this model's are rotary": config.position_embedding == "learned",
        "it has LayerNorm": config.norm_type == "layer",
        "its MLP has no gate": not config.mlp_gated,
        "its projections all have biases": config.attention_bias and config.mlp_bias,
        "it has as many key as query heads": config.num_key_value_heads == config.num_attention_heads,
        "its hidden size is heads x head_dim": config.num_attention_heads * config.head_dim == config.hidden_size,
        "it has no q, k or v norm": not (config.q_norm or config.k_norm or config.v_norm),
        "it has no norm after attention or MLP": not config.sandwich_norm,
        "it has no softcap": config.final_logit_softcapping is None,
        "it has no local layers": SLIDING not in (config.layer_types or []),
    }


def to_gpt2(config: ArgonneConfig, state: dict[str, Tensor]) -> Native:
    """Conv1D keeps its weight transposed, and q, k, v in one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    new = {
        "transformer.wte.weight": state["model.embed_tokens.weight"],
        "transformer.wpe.weight": state["model.embed_positions.weight"],
        "lm_head.weight": state["lm_head.weight"],
    }
    for kind in ("weight", "bias"):
        new[f"transformer.ln_f.{kind}"] = state[f"model.norm.{kind}"]
        for layer in range(config.num_hidden_layers):
            here, there = f"model.layers.{layer}", f"transformer.h.{layer}"
            joined = torch.cat([state[f"{here}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
            new[f"{there}.attn.c_attn.{kind}"] = joined.T.contiguous() if kind == "weight" else joined
            for ours, theirs in GPT2_NAMES.items():
                tensor = state[f"{here}.{ours}.{kind}"]
                new[f"{there}.{theirs}.{kind}"] = tensor.T.contiguous() if tensor.dim() == 2 else tensor
    twin = GPT2Config(  # no n_ctx: llama.cpp and mlx-lm need it, and would go on to the GELU of tanh
        vocab_size=config.vocab_size,
        n_positions=config.max_position_embeddings,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_inner=config.intermediate_size,
        activation_function=config.hidden_act,
        layer_norm_epsilon=config.rms_norm_eps,
        resid_pdrop=config.hidden_dropout,
        embd_pdrop=config.hidden_dropout,
        attn_pdrop=config.attention_dropout,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return Native(GPT2LMHeadModel, twin, new)


# --- 2.x
# ----------------------------------------------------------------------------------------------------


def llama_like(config: ArgonneConfig) -> dict[str, bool]:
    """What Llama, Mistral and llama.cpp's llama have in common."""
    return {
        "its positions are rotary": config.position_embedding == "rope",
        "it has RMSNorm": config.norm_type == "rms",
        "its MLP has a gate": config.mlp_gated,
        "it has no q, k or v norm": not (config.q_norm or config.k_norm or config.v_norm),
        "it has no norm after attention or MLP": not config.sandwich_norm,
        "it has no softcap": config.final_logit_softcapping is None,
    }


def llama_is(config: ArgonneConfig) -> dict[str, bool]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    return {
        **llama_like(config),
        "it has no local layers": SLIDING not in (config.layer_types or []),
        f"its heads divide the hidden size, {hidden} / {heads} do not": hidden % heads == 0,
    }


def mistral_is(config: ArgonneConfig) -> dict[str, bool]:
    return {
        **llama_like(config),
        "it has no biases": not (config.attention_bias or config.mlp_bias),
        "its layers are all local or all full": len(set(config.layer_types or [])) == 1,
    }


def _rotary(config: ArgonneConfig) -> dict[str, Any]:
    """Config fields that Llama and Mistral name as we do."""
    rope, dropout = dict(config.rope_parameters or {}), config.attention_dropout
    return {**_common(config), "hidden_act": config.hidden_act, "rope_parameters": rope, "attention_dropout": dropout}


def to_llama(config: ArgonneConfig, state: dict[str, Tensor]) -> Native:
    """The same tensors under the same names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    twin = LlamaConfig(**_rotary(config), attention_bias=config.attention_bias, mlp_bias=config.mlp_bias)
    twin.rope_theta = (config.rope_parameters or {})["rope_theta"]  # mlx-lm reads it here alone, and assumes 10,000
    return Native(LlamaForCausalLM, twin, state)


def to_mistral(config: ArgonneConfig, state: dict[str, Tensor]) -> Native:
    """Llama with one window for all layers, and with no word about how heads divide the hidden size."""
    from transformers import MistralConfig, MistralForCausalLM

    twin = MistralConfig(**_rotary(config), sliding_window=config.sliding_window)
    twin.rope_theta = (config.rope_parameters or {})["rope_theta"]
    # No layer_types, from which alone mlx-lm learns of a window: with it transformers makes a Ministral of the folder.
    return Native(MistralForCausalLM, twin, state)


# --- 3.x
# ----------------------------------------------------------------------------------------------------


def gemma4_is(config: ArgonneConfig) -> dict[str, bool]:
    last = (config.layer_types or [""])[-1]
    return {
        "its positions are rotary": config.position_embedding == "rope",
        "it has RMSNorm": config.norm_type == "rms",
        "its MLP has a gate": config.mlp_gated,
        "its projections have no biases": not (config.attention_bias or config.mlp_bias),
        "it has q, k and v norms": config.q_norm and config.k_norm and config.v_norm,
        "it has norms after attention and MLP": config.sandwich_norm,
        f"its last layer must be full attention, here it is {last}": last != SLIDING,
    }


def to_gemma4(config: ArgonneConfig, state: dict[str, Tensor]) -> Native:
    """Folded: it scales embeddings by sqrt(H), does not scale scores, and its v norm has no gain.

    transformers writes no `global_head_dim`: llama.cpp's converter stops there, and mlx-lm, which assumes 512, at
    shapes of other heads. It is not added: both would go on to GELU, whatever `hidden_activation` says.

    embedding / sqrt(H) (and final norm x sqrt(H) where the head is tied to it), q_norm x head_dim^-0.5, o_proj columns
    x v gain. Folded in fp32 at least and rounded once.
    """
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    root = config.hidden_size**0.5
    new = dict(state)

    def fold(name: str, factor: float | Tensor) -> None:
        wide = torch.promote_types(state[name].dtype, torch.float32)
        new[name] = (state[name].to(wide) * factor).to(state[name].dtype)

    fold("model.embed_tokens.weight", 1 / root)
    if config.tie_word_embeddings:
        fold("model.norm.weight", root)
        new["lm_head.weight"] = new["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        attention = f"model.layers.{layer}.self_attn"
        fold(f"{attention}.q_norm.weight", config.head_dim**-0.5)
        gain = new.pop(f"{attention}.v_norm.weight")
        fold(
            f"{attention}.o_proj.weight",
            gain.to(torch.promote_types(gain.dtype, torch.float32)).repeat(config.num_attention_heads),
        )
        new[f"model.layers.{layer}.layer_scalar"] = torch.ones(1, dtype=gain.dtype)
    twin = Gemma4TextConfig(
        **_common(config),
        global_head_dim=config.head_dim,  # type: ignore[call-arg]
        hidden_activation=config.hidden_act,
        rope_parameters={kind: dict(config.rope_parameters or {}) for kind in (FULL, SLIDING)},
        layer_types=list(config.layer_types or []),
        sliding_window=config.sliding_window or 512,  # read by local layers only
        final_logit_softcapping=config.final_logit_softcapping,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=config.vocab_size,
        attention_dropout=config.attention_dropout,
    )
    return Native(Gemma4ForCausalLM, twin, new)
