"""Attention of a CPU in bf16 as matrix products, a block of scores at a time. Ships with each checkpoint.

Where the processor multiplies bf16 in vectors and has no tiles, torch's fused kernel gains nothing by it; products do.
Scores and their softmax are in fp32, weights and their gradients in bf16, sums over queries in fp32. Memory is linear
in the length: the backward pass computes the weights again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .fused import Pattern

QUERIES = 64  # of a block
SCORES = 2_000_000  # at once, in all heads, so that they stay in the caches


def why_not_blocks(query: Tensor, key: Tensor, pattern: Pattern, dropout: float) -> str | None:
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return f"blocks are for bf16 on a CPU, this is {query.dtype} on {query.device.type}"
    if torch.compiler.is_compiling() or type(query) is not Tensor or type(key) is not Tensor:
        return "blocks are for plain tensors outside compiled code"
    if pattern.dense is not None or query.shape[2] != key.shape[2]:
        return "blocks need a window or documents, not a dense mask"
    return f"blocks know no dropout, this is {dropout}" if dropout else None


def first_seen(pattern: Pattern, rows: int, length: int) -> Tensor | None:
    """(rows, T): the first key that each query sees; it sees all from there to its own. None where that is 0."""
    first = None
    if pattern.segments is not None:
        cuts = pattern.segments.cumulative.to(torch.int64)
        first = torch.repeat_interleave(cuts[:-1], cuts.diff()).view(rows, length)
        first = first - torch.arange(0, rows * length, length)[:, None]
    if pattern.window is not None:
        near = (torch.arange(length) - pattern.window + 1).clamp_min(0).expand(rows, length)
        first = near if first is None else torch.maximum(first, near)
    return first


def block_attention(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """query (B, Hq, T, D), key and value (B, Hkv, T, D) -> (B, T, Hq, D)."""
    first = first_seen(pattern, query.shape[0], query.shape[2])
    found: Tensor = _Blocks.apply(query, key, value, first, scale)
    return found


class _Blocks(torch.autograd.Function):
    """`block_attention`, given what `first_seen` says of the pattern."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, scale: float) -> Tensor:
        key, value = key.contiguous(), value.contiguous()
        found = query.new_empty(query.transpose(1, 2).shape)
        grouped = _grouped(found.transpose(1, 2), key)
        for rows, heads, queries, keys, weights in _weights(query, key, first, scale):
            part = grouped[rows, heads, :, queries]
            part.copy_(torch.bmm(weights, value[rows, heads, keys].flatten(0, 1)).view(part.shape))
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.scale = inputs[4]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, first = ctx.saved_tensors
        key, value = key.contiguous(), value.contiguous()
        on_query = torch.empty_like(query)
        on_key, on_value = (torch.zeros(key.shape, dtype=_wide(key)) for _ in range(2))
        asking, given, target = (_grouped(x, key) for x in (query, upstream.transpose(1, 2), on_query))
        for rows, heads, queries, keys, weights in _weights(query, key, first, ctx.scale):
            seen, block = (rows, heads, keys), (rows, heads, slice(None), queries)
            k, v = (x[seen].flatten(0, 1) for x in (key, value))
            q, up = (x[block].flatten(2, 3).flatten(0, 1) for x in (asking, given))
            on_scores = torch._softmax_backward_data(torch.bmm(up, v.mT), weights, -1, weights.dtype)
            on_q = torch.baddbmm(q, on_scores, k, beta=0, alpha=ctx.scale)
            target[block] = on_q.view(target[block].shape)
            on_key[seen] += torch.bmm(on_scores.mT, q).view_as(key[seen])
            on_value[seen] += torch.bmm(weights.mT, up).view_as(value[seen])
        return on_query, on_key.mul_(ctx.scale).to(key.dtype), on_value.to(value.dtype), None, None


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """(B, Hq, T, D) as it is seen by heads of keys: (B, Hkv, queries of each, T, D)."""
    return x.unflatten(1, (key.shape[1], -1))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _weights(
    query: Tensor, key: Tensor, first: Tensor | None, scale: float
) -> Iterator[tuple[slice, slice, slice, slice, Tensor]]:
    """Attention weights in the dtype of the queries, by blocks: which rows, heads of keys, queries and keys, and
    (rows x heads, group x queries, keys).
    """
    grouped = _grouped(query, key)
    rows, heads, group, length, _ = grouped.shape
    place = torch.arange(length)
    longest = length if first is None else int((place - first).max()) + QUERIES
    most = max(1, SCORES // (group * QUERIES * longest))  # heads, those of all rows counted
    for row, head in itertools.product(range(0, rows, max(1, most // heads)), range(0, heads, min(heads, most))):
        part = slice(row, row + max(1, most // heads)), slice(head, head + min(heads, most))
        wide = key[part].flatten(0, 1).to(_wide(key))
        for start in range(0, length, QUERIES):
            queries = slice(start, min(start + QUERIES, length))
            least = None if first is None else first[part[0], queries]
            keys = slice(0 if least is None else int(least.min()), queries.stop)
            q = grouped[(*part, slice(None), queries)]
            with torch.autocast("cpu", enabled=False):
                scores = torch.bmm(q.flatten(2, 3).flatten(0, 1).to(wide.dtype) * scale, wide[:, keys].mT)
                scores = scores.view(*q.shape[:-1], -1)
            later = place[keys] > place[queries, None]
            hidden = later[:, start:] if least is None else (later | (place[keys] < least[..., None]))[:, None, None]
            bias = torch.zeros(hidden.shape, dtype=wide.dtype).masked_fill_(hidden, -torch.inf)
            scores[..., -hidden.shape[-1] :] += bias  # to add is vectorised, to fill by a mask is not
            yield *part, queries, keys, torch.softmax(scores, -1).to(query.dtype).flatten(2, 3).flatten(0, 1)
