"""A pass for serving: what the model's own forward pass computes, without what its layers do there for training and for
other libraries. A step of a small model is mostly the calls between its matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argonne.model import ArgonneForCausalLM
from argonne.model.attention import IMPLEMENTATION
from argonne.model.layers import ArgonneDecoderLayer
from argonne.serve.products import entering, leaving, length_of, rounded_in_one, silu_of_first, weight_like
from argonne.serve.slots import Slots

Turns = tuple[Tensor, Tensor]
DEPENDENT = "dynamic"  # a rotation whose frequencies depend on the longest row


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


class Forward:
    """Passes of one model over slots. It reads the model's weights where they lie, but for the gains of norms, and the
    rotation of a position once: make another after a change of weights or of positions.
    """

    def __init__(self, model: ArgonneForCausalLM) -> None:
        base = model.model
        config = self.config = model.config
        self.heads = config.num_attention_heads, config.num_key_value_heads
        self.embed, self.rotary = base.embed, base.rotary_emb if config.position_embedding == "rope" else None
        self._tables: Turns = torch.empty(0), torch.empty(0)  # cos and sin of all positions so far
        self.layers = [_Layer(layer) for layer in base.layers]
        self.alone = all(layer.of_one_token is not None for layer in self.layers)
        self.head = entering(base.norm, model.lm_head)

    def __call__(
        self, ids: Tensor, slots: Slots, positions: Tensor, seen: Callable[[], Mapping[str, Tensor]], last: int = 1
    ) -> Tensor:
        """(rows x last, vocabulary) logits behind the last tokens of each row; `slots.at` has said where they lie, and
        `seen` makes the masks that Slots does.
        """
        hidden = self.embed(ids, positions)
        alone = self.alone and positions.shape[1] == 1
        masks = {} if alone else self._masks(seen(), positions.shape[1], hidden)
        turns = None if self.rotary is None else self._cos_and_sin(positions, slots.get_seq_length(), hidden.dtype)
        if turns is not None and not alone:
            turns = self._turns(*turns)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, index, slots, masks.get(layer.kind), turns)
        logits = self.head(hidden[:, -last:].flatten(0, 1))
        cap = self.config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap if cap else logits

    def _cos_and_sin(self, positions: Tensor, length: int, dtype: torch.dtype) -> Turns:
        """Of positions below `length`, (rows, tokens, D / 2) each: looked up, where they do not depend on others."""
        assert self.rotary is not None
        if self.rotary.kind == DEPENDENT or positions.device.type != "cpu":
            return self.rotary(positions, dtype)
        if len(self._tables[0]) < length:
            cos, sin = self.rotary(torch.arange(length)[None], dtype)
            self._tables = cos[0], sin[0]
        cos, sin = (F.embedding(positions, table) for table in self._tables)
        return cos, sin

    def _masks(self, seen: Mapping[str, Tensor], tokens: int, hidden: Tensor) -> dict[str, Tensor]:
        """What is added to the scores of each query, by layer type."""
        queries, keys = self.heads
        return {
            kind: torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device)
            .masked_fill_(~mask, -torch.inf)
            .repeat_interleave(rows_of_attention(queries // keys, tokens), dim=2)
            for kind, mask in seen.items()
        }

    def _turns(self, cos: Tensor, sin: Tensor) -> Turns:
        """What the heads of queries, keys and values are multiplied by, and their halves the other way round: (rows,
        tokens, heads, D) each. Values are not rotated.
        """
        cos, sin = cos[:, :, None], sin[:, :, None]
        queries, keys = self.heads
        straight, crossed = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        shape = (*straight.shape[:2], queries + keys, straight.shape[-1])
        still = (*straight.shape[:2], keys, straight.shape[-1])
        straight = torch.cat((straight.expand(shape), straight.new_ones(still)), 2)
        return straight, torch.cat((crossed.expand(shape), crossed.new_zeros(still)), 2)


class _Layer:
    def __init__(self, layer: ArgonneDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        config = attention.config
        self.kind, self.scale, self.size = attention.layer_type, attention.scaling, attention.head_dim
        self.window = config.sliding_window if self.kind == "sliding_attention" else None
        self.queries, self.keys, self.eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
        heads = attention.q_proj, attention.k_proj, attention.v_proj
        self.project = entering(layer.input_layernorm, *heads)
        like = weight_like(attention.q_proj)
        self.wide = torch.promote_types(like.dtype, torch.float32)
        self.all_normed = config.q_norm and config.k_norm and config.v_norm
        self.gains, self.normed = self._gains(attention, like)
        self.long_gains = self.gains
        if self.gains is not None and self.gains.dtype == self.wide:
            self.long_gains = self.gains * self.size**0.5  # x over its length has one of 1
        self.length = length_of(like.new_empty(self.size, dtype=self.wide), self.eps)
        behind, into, fed = None, layer.post_attention_layernorm, None
        if layer.sandwich:
            behind, into, fed = into, layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
        self.out = leaving(attention.o_proj, behind)
        self.up = entering(into, *((mlp.gate_proj, mlp.up_proj) if mlp.gated else (mlp.up_proj,)))
        act = F.silu if type(mlp.act_fn) is nn.SiLU else mlp.act_fn
        gated = silu_of_first if act is F.silu else lambda x: act(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
        self.down = leaving(mlp.down_proj, fed, gated if mlp.gated else act)
        self.of_one_token = None
        if rounded_in_one(*heads) is not None:
            from argonne.serve.heads import attend

            gains = None if self.gains is None else (self.gains, self.normed, self.eps)
            self.of_one_token = partial(attend, queries=self.queries, scale=self.scale, window=self.window, gains=gains)

    def _gains(self, attention: Any, like: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gains of the heads of queries, keys and values, (heads, D), and which of them are normed, (heads,)."""
        config, parts, flags = attention.config, [], []
        for name, count in (("q_norm", self.queries), ("k_norm", self.keys), ("v_norm", self.keys)):
            has = getattr(config, name)
            gain = getattr(attention, name).weight if has else like.new_ones(self.size)
            parts.append(gain.expand(count, self.size))
            flags += [has] * count
        return torch.cat(parts) if any(flags) else None, torch.tensor(flags, device=like.device)

    def __call__(self, hidden: Tensor, index: int, slots: Slots, mask: Tensor | None, turns: Turns | None) -> Tensor:
        """mask: None for a single token in each row, where `of_one_token` is there; turns are cos and sin then."""
        x = self.project(hidden)
        if mask is None:
            assert self.of_one_token is not None
            held = slots.held(index, 2 * self.keys, self.size, x)
            found = self.of_one_token(x, held, slots.lines, slots.places, turns=turns)
        else:
            found = self._attended(x.view(*x.shape[:2], -1, self.size), index, slots, mask, turns)
        hidden = self.out(found, hidden)
        return self.down(self.up(hidden), hidden)

    def _attended(self, x: Tensor, index: int, slots: Slots, mask: Tensor, turns: Turns | None) -> Tensor:
        rows, tokens = x.shape[:2]
        dtype = x.dtype
        if self.long_gains is not None:
            wide = x if dtype == self.wide else x.to(self.wide)
            normed = wide / self.length(wide)
            if dtype != self.wide:
                normed = normed.mul_(self.size**0.5).to(dtype)
            normed = normed * self.long_gains
            x = normed if self.all_normed else torch.where(self.normed[:, None], normed, x)
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
        return found.reshape(rows, tokens, -1)
