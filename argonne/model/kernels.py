"""The kernels that run attention under a pattern: which can, in which order, and how. Ships with each checkpoint.

The order is flash, varlen, flex, blocks, sdpa, math; sdpa goes before varlen and flex where a query sees all before it,
which torch's own causal kernels do fastest, and before blocks where those are no faster. `auto` takes the first that
can run this device, dtype, head size and mask; a forced kernel that cannot is a ValueError. Running out of memory is
never a reason to take another one: nothing here is caught. All take query (B, Hq, Tq, D), key and value (B, Hkv, Tk, D)
and return (B, Tq, Hq, D).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import block_attention, why_not_blocks
from .fused import (
    HALF,
    Pattern,
    Segments,
    mask_function,
    pad_heads,
    run_fused,
    why_not_flash,
    why_not_flex,
    why_not_varlen,
)

ORDER = ("flash", "varlen", "flex", "blocks", "sdpa", "math")
# Flex runs forward only on the CPU: training and evaluation shall not take different paths there by themselves.
ORDER_ON_CPU = ("blocks", "sdpa", "math")
ORDER_OF_CAUSAL = ("flash", "sdpa", "math")


class KernelUnavailable(ValueError):
    """A kernel that was asked for cannot run here."""


def choose_kernel(wanted: str, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, dropout: float) -> str:
    """The kernel that will run. Raises ValueError when `wanted` is no kernel, or is forced and cannot run; the message
    says why.

    One query over cached keys is a matrix-vector product that no choice is offered for: it runs on sdpa, or on math
    where that is forced.
    """
    if wanted not in ("auto", *ORDER):
        raise ValueError(f"attention kernel {wanted!r} is not known; expected auto or one of {', '.join(ORDER)}")
    cached = query.shape[2] != key.shape[2] and pattern.gather is None
    if cached or query.shape[2] == 1:
        return "math" if wanted == "math" else "sdpa"
    if wanted != "auto":
        reason = why_not(wanted, query, key, value, pattern, dropout)
        if reason:
            raise KernelUnavailable(
                f"attention kernel {wanted!r} was asked for and cannot run: {reason}; choose another or auto"
            )
        return wanted
    causal = pattern.segments is None and pattern.window is None and pattern.dense is None
    order: tuple[str, ...] = ORDER_OF_CAUSAL if causal else ORDER
    if query.device.type == "cpu":
        order = ORDER_ON_CPU if blocks_are_faster(query, pattern) else ORDER_ON_CPU[1:]
    return next(kernel for kernel in order if why_not(kernel, query, key, value, pattern, dropout) is None)


def blocks_are_faster(query: Tensor, pattern: Pattern) -> bool:
    """Than torch's kernel on a CPU, which gains by bf16 only with tiles (AMX), but takes 256 queries at once where 768
    keys can be seen, before that 64.
    """
    if query.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    seen = min(pattern.window or query.shape[2], pattern.segments.longest if pattern.segments else query.shape[2])
    # An export may meet a torch that does not tell.
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return seen < 768 and able.get("avx512_bf16", False) and not able.get("amx_tile", False)


def why_not(kernel: str, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, dropout: float) -> str | None:
    """Why this kernel cannot run this call, or None when it can. sdpa and math always can."""
    if kernel == "flash":
        return why_not_flash(query, key, pattern, dropout)
    if kernel == "varlen":
        return why_not_varlen(query, key, pattern, dropout)
    if kernel == "blocks":
        return why_not_blocks(query, key, pattern, dropout)
    return why_not_flex(query, key, value, pattern, dropout) if kernel == "flex" else None


def run_kernel(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, scale: float, dropout: float
) -> tuple[Tensor, str]:
    """Output (B, Tq, Hq, D) and the name of the path that made it."""
    if kernel == "math":
        return math_attention(query, key, value, pattern, scale, dropout), "math"
    if kernel == "blocks":
        return block_attention(query, key, value, pattern, scale), "blocks"
    if kernel == "sdpa":
        return sdpa_attention(query, key, value, pattern, scale, dropout)
    return run_fused(kernel, query, key, value, pattern, scale, dropout)


def visible(pattern: Pattern, rows: int, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """The pattern as a dense mask (B or 1, 1, Tq, Tk), True = visible; None where everything is. For `math`, and for
    tests.
    """
    if pattern.dense is not None:
        return pattern.dense
    if queries == 1 and pattern.segments is None and pattern.window is None:
        return None
    row = torch.arange(rows, device=device)[:, None, None, None]
    q = torch.arange(queries, device=device)[None, None, :, None] + (keys - queries)
    return mask_function(pattern, rows, queries, device)(row, row, q, torch.arange(keys, device=device))


def math_attention(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, scale: float, dropout: float) -> Tensor:
    """softmax(q k^T * scale) v in the open, at least in fp32: the reference for every other path. O(T^2) memory."""
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        q = query.to(wide).unflatten(1, (key.shape[1], groups))
        scores = torch.einsum("bkgqd,bknd->bkgqn", q, key.to(wide)) * scale
        mask = visible(pattern, query.shape[0], query.shape[2], key.shape[2], query.device)
        if mask is not None:
            mask = mask[:, :, None]
            lowest = torch.finfo(wide).min
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        weights = F.dropout(torch.softmax(scores, -1), dropout) if dropout else torch.softmax(scores, -1)
        output = torch.einsum("bkgqn,bknd->bqkgd", weights, value.to(wide))
    return output.flatten(2, 3).to(dtype)


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, scale: float, dropout: float
) -> tuple[Tensor, str]:
    """torch's fused kernels: causal as it is, a window as blocks, segments one by one; a dense mask only where it has
    one.
    """
    how = scale, dropout
    if query.shape[2] == 1 and pattern.segments is None:
        return _decode(how, query, key, value, pattern.dense), "sdpa-decode"
    if pattern.dense is not None:
        return _sdpa(query, key, value, *how, mask=pattern.dense).transpose(1, 2), "sdpa-mask"
    if pattern.segments is not None:
        path = "sdpa-documents" if pattern.window is None else "sdpa-documents-window"
        return _by_segment(how, query, key, value, pattern.segments, pattern.window), path
    if pattern.window is not None:
        return _windowed(how, query, key, value, pattern.window).transpose(1, 2), "sdpa-window-blocks"
    return _sdpa(query, key, value, *how, causal=True).transpose(1, 2), "sdpa-causal"


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """One call of torch's scaled_dot_product_attention, (B, H, T, D), in a form that its fused kernels take."""
    settings: dict[str, Any] = {"dropout_p": dropout, "scale": scale, "is_causal": causal and q.shape[2] > 1}
    if q.device.type == "cuda":
        return sdpa_for_cuda(q, k, v, mask, settings)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, **settings, **({"enable_gqa": True} if grouped else {}))


def sdpa_for_cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> Tensor:
    """CUDA's fused kernels want head sizes in eights, and only its flash kernel (fp16, bf16, no mask) knows grouped
    queries.

    With a mask the queries of a group are laid one after the other, so that no key is repeated; without one, in fp32,
    keys are.
    """
    size, groups = q.shape[-1], q.shape[1] // k.shape[1]
    q, k, v = (pad_heads(x, -(-size // 8) * 8) for x in (q, k, v))
    if groups == 1:
        return F.scaled_dot_product_attention(q, k, v, mask, **settings)[..., :size]
    if mask is None and q.dtype in HALF:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **settings)[..., :size]
    if mask is not None and (mask.dim() == 2 or mask.shape[1] == 1):
        folded = q.unflatten(1, (-1, groups)).flatten(2, 3)
        tall = mask.expand(*mask.shape[:-2], q.shape[2], k.shape[2]).repeat(*[1] * (mask.dim() - 2), groups, 1)
        out = F.scaled_dot_product_attention(folded, k, v, tall, **settings)
        return out.unflatten(2, (groups, -1)).flatten(1, 2)[..., :size]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, **settings)[..., :size]


def _decode(how: tuple[float, float], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """One query a row. The queries that share a key head take the place of the sequence, so that no key is repeated.
    (B, 1, Hq, D)
    """
    rows, heads, _, width = query.shape
    if mask is not None and mask.shape[1] != 1:
        return _sdpa(query, key, value, *how, mask=mask).transpose(1, 2)
    packed = _sdpa(query.reshape(rows, key.shape[1], -1, width), key, value, *how, mask=mask)
    return packed.reshape(rows, 1, heads, width)


@torch.compiler.disable(
    reason="the lengths of documents differ in every batch: compiled code would be made anew each time"
)
def _by_segment(
    how: tuple[float, float], query: Tensor, key: Tensor, value: Tensor, segments: Segments, window: int | None
) -> Tensor:
    """Each segment by itself with the causal kernel. Split and cat, not slices: the gradient of a slice is a full
    tensor of zeros.
    """
    rows, heads, length, width = query.shape
    lengths = segments.lengths if segments.lengths is not None else tuple(segments.cumulative.diff().tolist())
    flat = [x.transpose(1, 2).reshape(rows * length, x.shape[1], width).split(lengths) for x in (query, key, value)]
    outputs = []
    for q, k, v in zip(*flat, strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        whole = window is None or window >= q.shape[2]
        part = _sdpa(q, k, v, *how, causal=True) if whole else _windowed(how, q, k, v, int(window or 0))
        outputs.append(part[0].transpose(0, 1))
    return torch.cat(outputs).view(rows, length, heads, width)


def _windowed(how: tuple[float, float], query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """A window of `window` keys over T > window tokens, in blocks of at least `window`: a block sees itself and the one
    before it.

    The first block has none before it; all the others share one small band mask. Work and memory are O(T * block).
    Returns (B, Hq, T, D).
    """
    rows, _, length, _ = query.shape
    block = max(32, window)  # never so few queries that the calls cost more than the work
    i = torch.arange(block, device=query.device)[:, None] + block
    j = torch.arange(2 * block, device=query.device)[None, :]
    band = (j <= i) & (j > i - window)
    if block >= length:
        return _sdpa(query, key, value, *how, mask=band[:length, block : block + length])
    q, k, v = (x[:, :, :block] for x in (query, key, value))
    first = _sdpa(q, k, v, *how, mask=None if block <= window else band[:, block:], causal=block <= window)
    padding = -length % block
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, block)).transpose(1, 2) for x in (query, key, value))
    others = q.shape[1] - 1
    near = [torch.cat([x[:, :-1], x[:, 1:]], dim=3).flatten(0, 1) for x in (k, v)]
    rest = (
        _sdpa(q[:, 1:].flatten(0, 1), near[0], near[1], *how, mask=band)
        .unflatten(0, (rows, others))
        .transpose(1, 2)
        .flatten(2, 3)
    )
    return torch.cat([first, rest], dim=2)[:, :, :length]
