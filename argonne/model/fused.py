"""FlashAttention, torch's varlen and flex attention under a pattern. Differences between torch 2.11 and 2.13 stay here.
Ships with each checkpoint.

Head sizes that a kernel does not know are padded with zeros: zeros in q and k add nothing to a score, zeros in v only
to columns that are cut off again. All take query (B, Hq, T, D), key and value (B, Hkv, T, D) and return (B, T, Hq, D).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
FLEX_BLOCK = 128  # queries, and keys, that flex attention judges at once


@dataclass(frozen=True)
class Segments:
    """Cuts of a flattened batch (B * T tokens): a token sees none but its own segment. Row ends are always cuts.

    cumulative: (S + 1,) int32 on the device of the tokens, from 0 to B * T. lengths: the same as Python numbers, where
    the cuts were known on the CPU. longest: an upper bound of a segment's length; off the CPU the row's, so that
    compiled code sees one number in all batches.
    """

    cumulative: Tensor
    lengths: tuple[int, ...] | None
    longest: int

    @staticmethod
    def of(cuts: Tensor, length: int, device: torch.device) -> Segments:
        """From sorted cuts 0 .. B * T of rows of `length` tokens that lie on `device`."""
        lengths = tuple(cuts.diff().tolist()) if cuts.device.type == "cpu" else None
        longest = max(lengths) if lengths is not None and device.type == "cpu" else length
        return Segments(cuts.to(device=device, dtype=torch.int32, non_blocking=True), lengths, longest)


@dataclass(frozen=True)
class Pattern:
    """What a query sees besides "not the future".

    window: keys it sees, itself included (None = all). segments: what it may not look out of. dense: (B, 1, Tq, Tk)
    bool, True = visible, replaces all else. own_keys: attend to this call's keys and values, not to what the cache
    returns (training, and the first call with an empty cache of any class). gather: where the queries are a part of
    their rows, keys and values that they may see from those of the part. memo: what a kernel makes of the pattern once
    for a device and reads in every layer there.
    """

    window: int | None = None
    segments: Segments | None = None
    dense: Tensor | None = None
    own_keys: bool = True
    gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = field(default=None, compare=False, repr=False)
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def to(self, device: torch.device | str | int) -> Pattern:
        """The same on `device`, for a layer that lies there."""
        segments = self.segments and replace(self.segments, cumulative=self.segments.cumulative.to(device))
        return replace(self, segments=segments, dense=None if self.dense is None else self.dense.to(device))


def pad_heads(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _flatten(x: Tensor, width: int) -> Tensor:
    """(B, H, T, D) -> (B * T, H, width)."""
    return pad_heads(x.transpose(1, 2).flatten(0, 1), width)


# --- FlashAttention (an extra)
# --------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # to look for a module cannot be compiled
def flash_library(capability: tuple[int, int]) -> tuple[str, Callable[..., Any], Callable[..., Any]] | None:
    """Name, flash_attn_func and flash_attn_varlen_func of the newest FlashAttention that fits this GPU; None where none
    is installed.

    Raises ImportError when one is installed and broken: taking another path then would hide it.
    """
    return _flash_library(capability)


@cache
def _flash_library(capability: tuple[int, int]) -> tuple[str, Callable[..., Any], Callable[..., Any]] | None:
    candidates = (("flash_attn_interface", (9, 0)), ("flash_attn", (8, 0)), ("flash_attn.cute", (9, 0)))
    for name, lowest in candidates:
        if (
            capability < lowest
            or importlib.util.find_spec(name.split(".")[0]) is None
            or importlib.util.find_spec(name) is None
        ):
            continue
        module = importlib.import_module(name)
        if hasattr(module, "flash_attn_func") and hasattr(module, "flash_attn_varlen_func"):
            return name, module.flash_attn_func, module.flash_attn_varlen_func
    return None


def why_not_flash(query: Tensor, key: Tensor, pattern: Pattern, dropout: float) -> str | None:
    if query.device.type != "cuda":
        return f"FlashAttention needs a CUDA device, this is {query.device.type}"
    library = flash_library(torch.cuda.get_device_capability(query.device))
    if library is None:
        return "FlashAttention is not installed (pip install 'argonne[flash]')"
    if dropout and "dropout_p" not in inspect.signature(library[1]).parameters:
        return f"{library[0]} has no dropout"
    return _why_not_half(query, key, pattern)


def _why_not_half(query: Tensor, key: Tensor, pattern: Pattern) -> str | None:
    """What FlashAttention and varlen share."""
    if query.dtype not in HALF:
        return f"it computes in fp16 or bf16, the queries are {query.dtype}"
    if query.shape[-1] > 256:
        return f"its heads go up to 256, these are {query.shape[-1]}"
    if pattern.dense is not None:
        return "it takes no dense mask"
    if query.shape[2] != key.shape[2]:
        return f"{query.shape[2]} queries over {key.shape[2]} cached keys"
    return None


def call_flash(
    whole: Callable[..., Any],
    ragged: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    scale: float,
    dropout: float,
) -> Tensor:
    """FlashAttention 2 or later, whose flash_attn_func and flash_attn_varlen_func are given.

    A window is its window (W - 1, 0): W keys, the own one included. Segments are cumulative lengths.
    """
    rows, heads, length, size = query.shape
    width = -(-size // 8) * 8
    settings: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    if pattern.window is not None:
        settings["window_size"] = (pattern.window - 1, 0)
    if dropout:
        settings["dropout_p"] = dropout
    if pattern.segments is None:
        found = whole(*(pad_heads(x.transpose(1, 2), width) for x in (query, key, value)), **settings)
    else:
        tensors = [_flatten(x, width) for x in (query, key, value)]
        cuts, longest = pattern.segments.cumulative, pattern.segments.longest
        found = ragged(
            *tensors, cu_seqlens_q=cuts, cu_seqlens_k=cuts, max_seqlen_q=longest, max_seqlen_k=longest, **settings
        )
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output.reshape(rows, length, heads, width)[..., :size]


# --- torch.nn.attention.varlen
# --------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def varlen_function() -> tuple[Callable[..., Any], tuple[str, ...]] | None:
    """torch's varlen_attn and the names of its parameters; None where this torch has none."""
    return _varlen_function()


@cache
def _varlen_function() -> tuple[Callable[..., Any], tuple[str, ...]] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, tuple(inspect.signature(varlen_attn).parameters)


def why_not_varlen(query: Tensor, key: Tensor, pattern: Pattern, dropout: float) -> str | None:
    if query.device.type != "cuda":
        return f"varlen attention needs a CUDA device, this is {query.device.type}"
    found = varlen_function()
    if found is None or "window_size" not in found[1] or "scale" not in found[1]:
        return f"torch {torch.__version__} has no varlen attention with windows"
    if query.shape[1] != key.shape[1] and "enable_gqa" not in found[1]:
        return f"varlen attention of torch {torch.__version__} has no grouped queries"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "varlen attention needs compute capability 8.0"
    if dropout:
        return "varlen attention has no dropout"
    return _why_not_half(query, key, pattern)


def call_varlen(
    function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, scale: float
) -> Tensor:
    """torch's own ragged FlashAttention, its varlen_attn; the window (-1, 0) is causal without one."""
    rows, heads, length, size = query.shape
    width = -(-size // 8) * 8
    segments = pattern.segments or Segments(
        torch.arange(rows + 1, device=query.device, dtype=torch.int32) * length, None, length
    )
    settings: dict[str, Any] = {
        "scale": scale,
        "window_size": (-1 if pattern.window is None else pattern.window - 1, 0),
    }
    if heads != key.shape[1]:
        settings["enable_gqa"] = True
    q, k, v = (_flatten(x, width).contiguous() for x in (query, key, value))
    cuts, longest = segments.cumulative, segments.longest
    output: Tensor = function(q, k, v, cuts, cuts, longest, longest, **settings)
    return output.view(rows, length, heads, width)[..., :size]


# --- flex attention
# -------------------------------------------------------------------------------------------------------------------


def why_not_flex(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, dropout: float) -> str | None:
    if query.device.type not in ("cuda", "cpu"):
        return f"flex attention needs a CUDA device, this is {query.device.type}"
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "flex attention has no gradients on the CPU"
    if dropout:
        return "flex attention has no dropout"
    if pattern.dense is not None:
        return "flex attention takes no dense mask here"
    if query.shape[2] != key.shape[2]:
        return f"{query.shape[2]} queries over {key.shape[2]} cached keys"
    if query.shape[-1] > 256:
        return f"flex attention is not used for heads beyond 256, these are {query.shape[-1]}"
    if query.dtype == torch.float64 and query.device.type == "cuda":
        return "flex attention has no fp64 on CUDA"
    return None


def mask_function(
    pattern: Pattern, rows: int, length: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The pattern as flex attention's mask_mod(batch, head, query, key)."""
    window, number = pattern.window, None
    if pattern.segments is not None:
        tokens = torch.arange(rows * length, device=device, dtype=torch.int32)
        number = torch.searchsorted(pattern.segments.cumulative, tokens, right=True).view(rows, length)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if window is not None:
            seen = seen & (key > query - window)
        if number is not None:
            seen = seen & (number[batch, query] == number[batch, key])
        return seen

    return visible


def block_mask(pattern: Pattern, rows: int, length: int, device: torch.device) -> Any:
    """Which blocks of keys a block of queries sees in part, and which whole: flex attention's BlockMask.

    A query sees the keys from `low` to itself, and `low` never falls along a row: so a block is judged by its first and
    its last query, and no (T, T) mask is made, as create_block_mask would.
    """
    from torch.nn.attention.flex_attention import BlockMask

    query = torch.arange(length, device=device)
    low = torch.zeros(1, length, dtype=torch.int64, device=device)
    if pattern.segments is not None:
        cuts = pattern.segments.cumulative.to(torch.int64)
        tokens = query + torch.arange(rows, device=device)[:, None] * length
        low = cuts[torch.searchsorted(cuts, tokens, right=True) - 1] - tokens + query
    if pattern.window is not None:
        low = low.clamp_min(query - pattern.window + 1)
    blocks = torch.arange(-(-length // FLEX_BLOCK), device=device)
    key, own = blocks * FLEX_BLOCK, blocks[:, None]
    first, last = key, (key + FLEX_BLOCK - 1).clamp_max(length - 1)
    # Of a last block that is cut off torch counts none whole.
    whole = (key >= low[:, last, None]) & (blocks < own) & (own * FLEX_BLOCK + FLEX_BLOCK <= length)
    part = (key + FLEX_BLOCK > low[:, first, None]) & (blocks <= own) & ~whole

    def listed(seen: Tensor) -> tuple[Tensor, Tensor]:
        """(1 or B, 1, blocks) how many, and their numbers first in (1 or B, 1, blocks, blocks)."""
        order = seen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return seen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]

    mask = mask_function(pattern, rows, length, device)
    return BlockMask.from_kv_blocks(
        *listed(part), *listed(whole), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask, seq_lengths=(length, length)
    )


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention as function

    # Whole or not at all: past the compiler's limit of shapes it would go on in the open, with all scores in memory.
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True)
    return compiled


def flex_attention(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """torch's flex attention; the block mask is made once a pattern. Compiled on CUDA: uncompiled it would hold all
    scores.
    """
    from torch.nn.attention.flex_attention import flex_attention as plain

    rows, heads, length, size = query.shape
    if query.device not in pattern.memo:
        pattern.memo[query.device] = block_mask(pattern, rows, length, query.device)
    width = max(16, 1 << (size - 1).bit_length())  # its kernels want powers of two
    compiled = query.device.type == "cuda" and not torch.compiler.is_compiling()
    function: Any = _compiled_flex() if compiled else plain
    q, k, v = (pad_heads(x, width) for x in (query, key, value))
    output = function(q, k, v, block_mask=pattern.memo[query.device], scale=scale, enable_gqa=heads != key.shape[1])
    assert isinstance(output, Tensor)
    return output[..., :size].transpose(1, 2)


# --- any of them
# ----------------------------------------------------------------------------------------------------------------------


def run_fused(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, scale: float, dropout: float
) -> tuple[Tensor, str]:
    """`kernels.run_kernel` for flash, varlen and flex."""
    words = (["documents"] if pattern.segments is not None else []) + (["window"] if pattern.window is not None else [])
    path = f"{kernel}-{'-'.join(words) or 'causal'}"
    if kernel == "flex":
        return flex_attention(query, key, value, pattern, scale), path
    if kernel == "varlen":
        found = varlen_function()
        assert found is not None
        return call_varlen(found[0], query, key, value, pattern, scale), path
    library = flash_library(torch.cuda.get_device_capability(query.device))
    assert library is not None
    return call_flash(library[1], library[2], query, key, value, pattern, scale, dropout), path
