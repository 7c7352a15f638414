"""A pass for serving: what the model's own forward pass computes, without what its layers do there for training and for
other libraries. A step of a small model is mostly the calls between its matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argonne.model import ArgonneForCausalLM
from argonne.model.attention import IMPLEMENTATION
from argonne.model.layers import ArgonneDecoderLayer, ArgonneRMSNorm
from argonne.model.loss import product
from argonne.serve.quantize import Int8Linear, Part, in_a_row
from argonne.serve.slots import Slots

Product = Callable[[Tensor], Tensor]
LARGE = 2**19  # weights: below, the call itself takes longest


def can_be_served_so(model: Any) -> bool:
    """A plain model of ours: nothing hooks into its layers, no weight is sharded, and nobody has forced an attention
    kernel.
    """
    if not isinstance(model, ArgonneForCausalLM) or model.config._attn_implementation != IMPLEMENTATION:
        return False
    plain = all(type(layer) is ArgonneDecoderLayer for layer in model.model.layers)
    plain = plain and all(type(weight) is nn.Parameter for weight in model.parameters())
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return plain and not hooked and all(layer.attention_kernel == "auto" for layer in model._attentions())


def rows_of_attention(group: int, tokens: int) -> int:
    """Rows of queries that a head of keys is given for each token: one more where a lone token has an odd number. torch
    gives each thread working memory behind the other's, and only for an even number does every row lie as the next
    thread's does: MKL rounds otherwise where memory is not aligned as elsewhere (seen on AMD).
    """
    return group + group % 2 if tokens == 1 else group


def joined(*linears: nn.Module) -> Product:
    """Their outputs side by side."""
    if isinstance(linears[0], Part):
        return product_of_rounded(linears[0].together)
    if isinstance(linears[0], Int8Linear):
        rounded = [product_of_rounded(linear) for linear in linears if isinstance(linear, Int8Linear)]
        return rounded[0] if len(rounded) == 1 else lambda x: torch.cat([part(x) for part in rounded], -1)
    plain: list[Any] = list(linears)
    weights, biases = [linear.weight for linear in plain], [linear.bias for linear in plain]
    bias = torch.cat(biases) if biases[0] is not None else None
    if (weight := in_a_row(weights)) is not None:
        return product_of(weight, bias)
    parts = [product_of(weight, None) for weight in weights]
    if bias is None:
        return lambda x: torch.cat([part(x) for part in parts], -1)
    return lambda x: torch.cat([part(x) for part in parts], -1) + bias


def product_of(weight: Tensor, bias: Tensor | None) -> Product:
    """x W^T + b. A few rows by a large fp32 matrix are multiplied sooner by oneDNN than by MKL, which torch takes."""
    large = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= LARGE
    if large and torch.backends.mkldnn.is_available():
        return lambda x: product(x, weight, bias)
    return lambda x: F.linear(x, weight, bias)


def product_of_rounded(layer: Int8Linear) -> Product:
    one_row, rows = layer.of_one_row, layer.forward
    size = layer.in_features
    return lambda x: one_row(x) if x.numel() == size and x.dtype == torch.float32 else rows(x)


class Forward:
    """Passes of one model over slots. It reads the model's weights where they lie, but for the gains of norms: make
    another after a change of weights.
    """

    def __init__(self, model: ArgonneForCausalLM) -> None:
        base = model.model
        config = self.config = model.config
        self.heads = config.num_attention_heads, config.num_key_value_heads
        self.embed, self.rotary = base.embed, base.rotary_emb if config.position_embedding == "rope" else None
        self.layers = [_Layer(layer) for layer in base.layers]
        self.norm, self.head = norm_of(base.norm), joined(model.lm_head)

    def __call__(
        self, ids: Tensor, slots: Slots, positions: Tensor, seen: Mapping[str, Tensor], last: int = 1
    ) -> Tensor:
        """(rows x last, vocabulary) logits behind the last tokens of each row; `slots.at` has said where they lie."""
        hidden = self.embed(ids, positions)
        queries, keys = self.heads
        masks = {
            kind: torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device)
            .masked_fill_(~mask, -torch.inf)
            .repeat_interleave(rows_of_attention(queries // keys, positions.shape[1]), dim=2)
            for kind, mask in seen.items()
        }
        turns = self._turns(positions, hidden) if self.rotary is not None else None
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, index, slots, masks[layer.kind], turns)
        logits = self.head(self.norm(hidden[:, -last:].flatten(0, 1)))
        cap = self.config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap if cap else logits

    def _turns(self, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the heads of queries, keys and values are multiplied by, and their halves the other way round: (rows,
        tokens, heads, D) each. Values are not rotated.
        """
        assert self.rotary is not None
        cos, sin = (x[:, :, None] for x in self.rotary(positions, hidden.dtype))
        queries, keys = self.heads
        straight, crossed = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        shape = (*straight.shape[:2], queries + keys, straight.shape[-1])
        still = (*straight.shape[:2], keys, straight.shape[-1])
        straight = torch.cat((straight.expand(shape), straight.new_ones(still)), 2)
        return straight, torch.cat((crossed.expand(shape), crossed.new_zeros(still)), 2)


def weight_like(linear: Any) -> Tensor:
    """Any tensor of the dtype and device of a layer's weight: to ask an int8 layer for its weight unpacks it whole."""
    if isinstance(linear, Part):
        return linear.together.scale
    return linear.scale if isinstance(linear, Int8Linear) else linear.weight


def norm_of(module: nn.Module) -> Product:
    """Of fp32 or fp64, in a third of the calls of F.rms_norm, each of which takes a CPU longer than its numbers: x over
    the length of (x, sqrt(H eps)), times the gain and sqrt(H).
    """
    if not isinstance(module, ArgonneRMSNorm) or module.weight.dtype not in (torch.float32, torch.float64):
        return module
    length, gain = length_of(module.weight, module.variance_epsilon), module.weight * module.weight.shape[0] ** 0.5
    return lambda x: (x / length(x)).mul_(gain)


def length_of(vector: Tensor, eps: float) -> Product:
    """sqrt(sum(x^2) + size eps) of vectors of the size, dtype and device of this one; the last dimension is kept."""
    least = vector.new_tensor((eps * vector.shape[0]) ** 0.5)
    return lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(least)


class _Layer:
    def __init__(self, layer: ArgonneDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        config = attention.config
        self.kind, self.scale, self.size = attention.layer_type, attention.scaling, attention.head_dim
        self.queries, self.keys = config.num_attention_heads, config.num_key_value_heads
        self.before, self.project = (
            norm_of(layer.input_layernorm),
            joined(attention.q_proj, attention.k_proj, attention.v_proj),
        )
        self.out = joined(attention.o_proj)
        like = weight_like(attention.q_proj)
        self.wide = torch.promote_types(like.dtype, torch.float32)
        self.gains, self.normed = self._gains(attention, like)
        self.length = length_of(like.new_empty(self.size, dtype=self.wide), config.rms_norm_eps)
        self.behind = self.fed = None
        self.into = norm_of(layer.post_attention_layernorm)
        if layer.sandwich:
            self.behind, self.into = self.into, norm_of(layer.pre_feedforward_layernorm)
            self.fed = norm_of(layer.post_feedforward_layernorm)
        self.up = joined(mlp.gate_proj, mlp.up_proj) if mlp.gated else joined(mlp.up_proj)
        self.gated, self.down = mlp.gated, joined(mlp.down_proj)
        self.act = F.silu if type(mlp.act_fn) is nn.SiLU else mlp.act_fn

    def _gains(self, attention: Any, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gains of the heads of queries, keys and values, (heads, D), in fp32 times sqrt(D), and which of them are
        normalised, where not all are.
        """
        config, parts, flags = attention.config, [], []
        for name, count in (("q_norm", self.queries), ("k_norm", self.keys), ("v_norm", self.keys)):
            has = getattr(config, name)
            gain = getattr(attention, name).weight if has else like.new_ones(self.size)
            parts.append(gain.expand(count, self.size))
            flags += [has] * count
        if not any(flags):
            return None, None
        gains = torch.cat(parts)
        if gains.dtype == self.wide:
            gains = gains * self.size**0.5
        return gains, None if all(flags) else torch.tensor(flags, device=like.device)[:, None]

    def __call__(
        self, hidden: Tensor, index: int, slots: Slots, mask: Tensor, turns: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        rows, tokens = hidden.shape[:2]
        x = self.project(self.before(hidden)).view(rows, tokens, -1, self.size)
        dtype = x.dtype
        if self.gains is not None:
            wide = x if dtype == self.wide else x.to(self.wide)
            normed = wide / self.length(wide)
            if dtype != self.wide:
                normed = normed.mul_(self.size**0.5).to(dtype)
            normed = normed * self.gains
            x = normed if self.normed is None else torch.where(self.normed, normed, x)
        if turns is not None:
            x = torch.addcmul(x * turns[0], x.roll(self.size // 2, -1), turns[1])
        query, new = x.to(dtype).split((self.queries, 2 * self.keys), 2)
        key, value = slots.write(index, new)
        if tokens > 1:
            query = query.view(rows, tokens, self.keys, -1, self.size).transpose(1, 2)
            query = query.reshape(rows, self.keys, -1, self.size)
        else:
            query = query.view(rows, self.keys, -1, self.size)
            if more := mask.shape[2] - query.shape[2]:
                query = F.pad(query, (0, 0, 0, more))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        if tokens > 1:
            found = found.view(rows, self.keys, tokens, -1, self.size).transpose(1, 2)
        else:
            found = found[:, :, : self.queries // self.keys]
        attended = self.out(found.reshape(rows, tokens, -1))
        hidden = hidden + (attended if self.behind is None else self.behind(attended))
        inner = self.up(self.into(hidden))
        if self.gated:
            gate, up = inner.chunk(2, -1)
            inner = self.act(gate) * up
        else:
            inner = self.act(inner)
        fed = self.down(inner)
        return hidden + (fed if self.fed is None else self.fed(fed))
