"""The parts of an Argonne model: norms, rotary positions, attention, MLP, decoder layer. Ships with each checkpoint.

Plain modules: no transformers decorators, hooks or checkpointing classes inside, so that compiling a layer, recomputing
it, sharding it or cutting a pipeline between two of them needs no patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import IMPLEMENTATION, LayerInputs, argonne_attention
from .configuration_argonne import SLIDING, ArgonneConfig


@dataclass(frozen=True)
class TrainingOptions:
    """Switches of a training run: how, never what. They are no config fields and are not saved."""

    activation_checkpointing: str = "none"
    checkpointing_stride: int = 2
    loss: str = "chunked"
    loss_chunk: int = 0
    z_loss: float = 0.0

    def recomputes(self, layer: int) -> bool:
        """Is this layer run again in the backward pass instead of keeping its activations?"""
        nth = self.activation_checkpointing == "every_nth" and layer % self.checkpointing_stride == 0
        return nth or self.activation_checkpointing == "full"


def _inverse_length(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which is kept."""
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).pow(2) / x.shape[-1] + eps).rsqrt()


class _RMSNorm(torch.autograd.Function):
    """`ArgonneRMSNorm` in fewer passes over memory, forward and backward: what a CPU spends on a norm."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The norm of x, and 1 / sqrt(mean(x^2) + eps) for the derivative."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = _inverse_length(wide, eps)
        normed = wide * inverse
        return (
            normed.mul_(weight) if normed.dtype == x.dtype == weight.dtype else normed.to(x.dtype) * weight
        ), inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.eps = inputs[2]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, gain = x.to(inverse.dtype), weight.to(inverse.dtype)
        if torch.is_grad_enabled():  # a derivative of this one is wanted, in which it is no constant
            inverse = _inverse_length(wide, ctx.eps)
        upstream = upstream.to(inverse.dtype)
        product = (upstream * wide).reshape(-1, x.shape[-1])
        on_x = on_weight = None
        if ctx.needs_input_grad[1]:
            on_weight = (product.t() @ inverse.flatten()).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            along = (product @ gain).view_as(inverse) * inverse.pow(2) / -x.shape[-1]
            on_x = (torch.addcmul(upstream * gain, wide, along) * inverse).to(x.dtype)
        return on_x, on_weight, None


def _on_a_cpu(x: Tensor, weight: Tensor) -> bool:
    """Is a norm waited for by a CPU? Compiled code makes its own passes."""
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    return plain and x.device.type == "cpu" and not torch.compiler.is_compiling()


class ArgonneRMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, at least in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        if _on_a_cpu(hidden_states, self.weight):
            # The same numbers either way: a policy that is its reference differs from it in no bit.
            norm = _RMSNorm.apply if torch.is_grad_enabled() else _RMSNorm.forward
            normed: Tensor = norm(hidden_states, self.weight, self.variance_epsilon)[0]
            return normed
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.promote_types(dtype, torch.float32))
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def make_norm(config: ArgonneConfig, size: int) -> nn.Module:
    return (
        ArgonneRMSNorm(size, config.rms_norm_eps)
        if config.norm_type == "rms"
        else nn.LayerNorm(size, eps=config.rms_norm_eps)
    )


class ArgonneRotaryEmbedding(nn.Module):
    """Rotary position tables (Su et al. 2021). Made anew from the config in each forward pass, in float64.

    It keeps no buffer on purpose: transformers 5 builds models on the meta device, where a non-persistent buffer comes
    back as garbage, and a buffer would follow `model.to(bfloat16)`. Scaled frequencies are transformers' own, in fp32.
    """

    def __init__(self, config: ArgonneConfig) -> None:
        super().__init__()
        self.config = config
        self.checked, self.kind = dict(config.rope_parameters or {}), config.rope_type

    @property
    def inv_freq(self) -> Tensor:
        """theta^(-2i / head_dim), (head_dim / 2,) float64 on the CPU."""
        return self._frequencies(torch.zeros(1, 1, dtype=torch.int64))[0]

    def _frequencies(self, position_ids: Tensor) -> tuple[Tensor, float]:
        """Frequencies, float64, and what cos and sin are multiplied by. Raises ValueError for settings that cannot be:
        they may have been changed since the model was built.
        """
        config, device = self.config, position_ids.device
        if config.rope_parameters != self.checked:
            config.check_rope()
            self.checked, self.kind = dict(config.rope_parameters or {}), config.rope_type
        if self.kind != "default":
            frequencies, factor = ROPE_INIT_FUNCTIONS[self.kind](config, device, seq_len=position_ids.max() + 1)
            return frequencies.to(torch.float64), factor
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
        return float(self.checked["rope_theta"]) ** (-steps / config.head_dim), 1.0

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, (B or 1, T, head_dim / 2), at least fp32. position_ids (B or 1, T)."""
        device = torch.device("cpu") if position_ids.device.type == "mps" else position_ids.device  # MPS has no float64
        frequencies, factor = self._frequencies(position_ids.to(device))
        angles = position_ids[..., None].to(device, torch.float64) * frequencies
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = (x if factor == 1.0 else x * factor for x in (angles.cos(), angles.sin()))
        return cos.to(position_ids.device, wide), sin.to(position_ids.device, wide)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, heads, D) by its positions, half-split layout: pairs are (i, i + D/2)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' `eager`: additive masks, whole attention weights. The reference that engines and tools expect to
    find.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = torch.softmax(weights, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ArgonneAttention(nn.Module):
    """Grouped-query causal self-attention; q, k and v each perhaps RMS-normalised over the head before the rotation (v
    is not rotated).
    """

    def __init__(self, config: ArgonneConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        assert config.layer_types is not None
        self.layer_type = config.layer_types[layer_idx]
        self.sliding_window = config.sliding_window if self.layer_type == SLIDING else None
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.attention_kernel = "auto"
        self.attention_path = "not run yet"
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)
        if config.q_norm:
            self.q_norm = ArgonneRMSNorm(config.head_dim, config.rms_norm_eps)
        if config.k_norm:
            self.k_norm = ArgonneRMSNorm(config.head_dim, config.rms_norm_eps)
        if config.v_norm:
            self.v_norm = ArgonneRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, inputs: LayerInputs) -> Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape)
        key = self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape)
        dtype = query.dtype
        if self.config.q_norm:
            query = self.q_norm(query)
        if self.config.k_norm:
            key = self.k_norm(key)
        if self.config.v_norm:
            value = self.v_norm(value)
        if inputs.cos is not None and inputs.sin is not None:
            query, key = rotate(query, inputs.cos, inputs.sin), rotate(key, inputs.cos, inputs.sin)
        # fp32 gains and tables promote; without these casts no fused kernel runs under bf16 autocast.
        query, key, value = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
        mask = inputs.masks[self.layer_type]
        if inputs.cache is not None:
            cached = inputs.cache.update(key, value, self.layer_idx)
            if not getattr(mask, "own_keys", False):
                key, value = cached
        implementation = str(self.config._attn_implementation)
        ours = implementation == IMPLEMENTATION  # never by name: another export in this process has registered its own
        attend: Any = argonne_attention
        if not ours:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **inputs.extra,
        )
        if inputs.weights is not None:
            inputs.weights.append(weights)
        if not ours and self.attention_path != implementation:
            self.attention_path = implementation
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1))


class ArgonneMLP(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) without a gate."""

    def __init__(self, config: ArgonneConfig) -> None:
        super().__init__()
        self.gated = config.mlp_gated
        if config.mlp_gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn: nn.Module = nn.SiLU() if config.hidden_act == "silu" else nn.GELU()

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class ArgonneDecoderLayer(nn.Module):
    """Pre-norm block; with `sandwich_norm` the outputs of attention and MLP are normalised too. Plain tensors in and
    out.
    """

    def __init__(self, config: ArgonneConfig, layer_idx: int) -> None:
        super().__init__()
        self.sandwich = config.sandwich_norm
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = ArgonneAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        if config.sandwich_norm:
            self.pre_feedforward_layernorm = make_norm(config, config.hidden_size)
            self.post_feedforward_layernorm = make_norm(config, config.hidden_size)
        self.mlp = ArgonneMLP(config)

    def forward(self, hidden_states: Tensor, inputs: LayerInputs) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), inputs)
        if self.sandwich:
            hidden_states = hidden_states + self.dropout(self.post_attention_layernorm(attended))
            fed = self.mlp(self.pre_feedforward_layernorm(hidden_states))
            return hidden_states + self.dropout(self.post_feedforward_layernorm(fed))
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
