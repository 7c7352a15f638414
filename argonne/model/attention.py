"""What each query may see, and the attention function that honours it. Ships with each checkpoint.

A `MaskPlan` says it without a dense tensor: causal, perhaps a window, perhaps segments (documents of a packed row; the
padded and the real part of a row). Only cached decoding, and masks that fit no pattern, carry a dense one.
`argonne_attention` is registered under the name `argonne` in transformers' interface and picks the kernel; the stock
names (`sdpa`, `eager`, `flash_attention_2`...) stay selectable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    AttentionMaskInterface,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from .configuration_argonne import FULL, SLIDING
from .fused import Pattern, Segments, block_mask
from .kernels import choose_kernel, run_kernel

IMPLEMENTATION = "argonne"


@dataclass(frozen=True)
class LayerInputs:
    """All that a decoder layer gets besides its hidden states. One object a forward pass, shared by the layers.

    cos, sin: (B or 1, T, head_dim / 2), None with learned positions. masks: layer type -> MaskPlan (ours) or tensor
    (stock attention). extra: keyword arguments of an engine, handed down to its attention function. weights: collects
    what an attention function returns of its weights, a tensor a layer; None where nobody asks.
    """

    cos: Tensor | None
    sin: Tensor | None
    masks: Mapping[str, Any]
    cache: Cache | None
    extra: Mapping[str, Any]
    weights: list[Tensor] | None = None

    def to(self, device: torch.device | str | int, **how: Any) -> LayerInputs:
        """All but the cache, whose layers stay where they are, on `device`. Where a `device_map` splits the model,
        accelerate's hook in front of each layer calls this on what the layer is given.
        """

        def moved(x: Any) -> Any:
            return x.to(device) if hasattr(x, "to") else x

        masks, extra = ({name: moved(x) for name, x in given.items()} for given in (self.masks, self.extra))
        return replace(self, cos=moved(self.cos), sin=moved(self.sin), masks=masks, extra=extra)


def document_starts(position_ids: Tensor | None, attention_mask: Tensor | None, rows: int) -> Tensor | None:
    """(rows, T): does a document begin with this token, because its position is not the previous one plus one? Of the
    first token it says nothing.

    Positions of padding mean nothing: generation gives them all the same, which would make each a document.
    """
    if position_ids is None or position_ids.dim() != 2:
        return None
    starts = (position_ids != position_ids.roll(1, -1) + 1).expand(rows, -1)
    if attention_mask is None:
        return starts
    return starts.to(attention_mask.device) & attention_mask.roll(1, -1) & attention_mask


def segments_of(
    position_ids: Tensor | None, attention_mask: Tensor | None, shape: tuple[int, int], device: torch.device
) -> Segments | str | None:
    """Segments of a batch from restarting positions and a 2-D mask; None for whole rows; "dense" for a mask with holes.

    position_ids (1 or B, T): see `document_starts`. attention_mask (B, T) bool: padding and text are segments of their
    own, so that text never sees padding; this needs the text of a row to be contiguous. Positions of tokens on a GPU
    may stay on the CPU: then counting the segments does not wait for the GPU.
    """
    rows, length = shape
    starts = document_starts(position_ids, attention_mask, rows)
    if attention_mask is not None:
        edges = attention_mask != attention_mask.roll(1, -1)
        if bool(((edges & attention_mask)[:, 1:].sum(-1) + attention_mask[:, 0].to(torch.int64) > 1).any()):
            return "dense"
        starts = edges if starts is None else edges | starts
    if starts is None or (found := starts[:, 1:].nonzero()).shape[0] == 0:
        return None
    inner = found[:, 0] * length + found[:, 1] + 1
    whole = torch.arange(rows + 1, device=inner.device) * length
    return Segments.of(torch.cat([whole, inner]).sort().values, length, device)


def dense_mask(
    position_ids: Tensor | None, attention_mask: Tensor | None, window: int | None, hidden: Tensor
) -> Tensor:
    """(B or 1, 1, T, T), True = visible: for masks with holes, and where code is traced and no value can be looked at.

    Padding sees padding alone, as in `segments_of`.
    """
    index = torch.arange(hidden.shape[1], device=hidden.device)
    distance = index[:, None] - index
    seen = ((distance >= 0) if window is None else (distance >= 0) & (distance < window))[None, None]
    starts = document_starts(position_ids, attention_mask, hidden.shape[0])
    parts = [] if starts is None else [starts.cumsum(-1)]
    for part in [*parts, *([] if attention_mask is None else [attention_mask])]:
        part = part.to(hidden.device)
        seen = seen & (part[:, None, :, None] == part[:, None, None, :])
    return seen


class Part(Protocol):
    """Tokens that are a part of their rows, from place `first` on (context parallelism).

    positions: (1 or B, length of the rows), which mark documents where they restart; rows may be filled up behind them.
    gather: (2, B, H, T, D) keys and values of this part -> (2, B, H, at least that length, D) of whole rows.
    """

    @property
    def first(self) -> int: ...
    @property
    def positions(self) -> Tensor: ...
    def gather(self, part: Tensor, /) -> Tensor: ...


def pattern_of_part(part: Part, window: int | None, hidden: Tensor) -> Pattern:
    """What the queries of a part, hidden (B, T, H), see: of the keys those from the first that one of them sees to
    their own.
    """
    first, end = part.first, part.first + hidden.shape[1]
    low = 0 if window is None else max(0, first - window + 1)
    query, key = (torch.arange(start, end, device=hidden.device) for start in (first, low))
    distance = query[:, None] - key
    seen = ((distance >= 0) if window is None else (distance >= 0) & (distance < window))[None, None]
    starts = document_starts(part.positions, None, hidden.shape[0])
    if starts is not None and bool(starts[:, 1:].any()):
        number = F.pad(starts.cumsum(-1), (0, max(0, end - starts.shape[1])), value=-1)
        number = number.to(hidden.device, non_blocking=True)
        seen = seen & (number[:, None, first:end, None] == number[:, None, None, low:end])

    def gather(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = part.gather(torch.stack([key, value]))[:, :, :, low:end]
        return keys, values

    return Pattern(dense=seen, gather=gather)


def attention_patterns(
    config: Any,
    hidden: Tensor,
    attention_mask: Any,
    position_ids: Tensor,
    cache: Cache | None,
    explicit_positions: bool,
) -> dict[str, Any]:
    """Masks by layer type, for the attention implementation that the config names.

    attention_mask: None, (B, Tk) with 1 = real token, a finished 4-D mask, or what `generate` prepares (a dict by layer
    type), or the Part of its rows that this is. Traced code (`torch.export`, a whole model under `torch.compile`) gets
    dense masks.
    """
    windows = {kind: config.sliding_window if kind == SLIDING else None for kind in config.layer_types}
    if not isinstance(attention_mask, (dict, Tensor, type(None))):
        return {kind: pattern_of_part(attention_mask, window, hidden) for kind, window in windows.items()}
    ours = config._attn_implementation == IMPLEMENTATION
    traced = torch.compiler.is_compiling()
    if isinstance(attention_mask, dict):
        masks = {kind: attention_mask.get(kind) for kind in windows}
    elif ours and attention_mask is not None and attention_mask.dim() == 4:
        masks = dict.fromkeys(windows, attention_mask)
    else:
        mask = None if not ours or attention_mask is None else attention_mask.to(torch.bool)
        if mask is not None and not traced and bool(mask.all()):
            mask = None
        empty = cache is None or (not traced and int(cache.get_seq_length()) == 0)
        if ours and empty and (mask is None or mask.shape[1] == hidden.shape[1]):
            positions = position_ids if explicit_positions else None
            segments: Segments | str | None = "dense"
            if not traced or (mask is None and positions is None and not torch.compiler.is_exporting()):
                segments = segments_of(positions, mask, (hidden.shape[0], hidden.shape[1]), hidden.device)
            if not isinstance(segments, str):
                return {kind: Pattern(window, segments) for kind, window in windows.items()}
            seen = {window: dense_mask(positions, mask, window, hidden) for window in set(windows.values())}
            return {kind: Pattern(dense=seen[window]) for kind, window in windows.items()}
        # transformers' own: 4-D tensors, block masks or None, whatever the named implementation wants.
        makers = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}
        given = {"config": config, "inputs_embeds": hidden, "attention_mask": attention_mask, "past_key_values": cache}
        masks = {kind: makers[kind](**given, position_ids=position_ids.to(hidden.device)) for kind in windows}
    if not ours:
        return masks
    # transformers leaves out a mask where several queries meet an empty cache: a static one returns free places too.
    alone = {kind: cache is None or (mask is None and hidden.shape[1] > 1) for kind, mask in masks.items()}
    return {kind: Pattern(dense=mask, own_keys=alone[kind]) for kind, mask in masks.items()}


def prepare_patterns(masks: Mapping[str, Any], config: Any, hidden: Tensor, kernel: str) -> None:
    """Make what flex attention needs of each pattern before the layers run: made inside a compiled layer, the first of
    them would be compiled apart from the others. hidden (B, T, H).
    """
    if hidden.device.type != "cuda" or torch.compiler.is_compiling():
        return
    rows, length = hidden.shape[:2]
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else hidden.dtype
    one = torch.empty((), dtype=dtype, device=hidden.device)  # the hidden states may be a DTensor
    query, key = (
        one.expand(rows, heads, length, config.head_dim)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    for pattern in masks.values():
        if isinstance(pattern, Pattern) and pattern.dense is None:
            wanted = _within(pattern, length)
            if hidden.device not in pattern.memo and choose_kernel(kernel, query, key, key, wanted, 0.0) == "flex":
                pattern.memo[hidden.device] = block_mask(wanted, rows, length, hidden.device)


def _within(pattern: Pattern, length: int) -> Pattern:
    """The pattern without a window that hides nothing of `length` tokens."""
    hides_nothing = pattern.window is not None and pattern.window >= length
    return replace(pattern, window=None) if hides_nothing else pattern


def argonne_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Pattern | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention under a pattern. query (B, Hq, Tq, D); key, value (B, Hkv, Tk, D); returns (B, Tq, Hq, D).

    The kernel is the first of flash, varlen, flex, blocks, sdpa, math that can, or the one that `configure_training`
    forced; what ran is kept in `module.attention_path`. Raises ValueError when a forced kernel cannot run.
    """
    pattern = attention_mask if isinstance(attention_mask, Pattern) else Pattern(dense=attention_mask)
    if pattern.gather is not None:
        key, value = pattern.gather(key, value)
    if pattern.dense is None and query.shape[2] != key.shape[2] and query.shape[2] > 1:
        raise ValueError(f"{query.shape[2]} queries over {key.shape[2]} keys need a mask: none was given")
    pattern = _within(pattern, query.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = choose_kernel(getattr(module, "attention_kernel", "auto"), query, key, value, pattern, dropout)
    output, path = run_kernel(kernel, query, key, value, pattern, scale, dropout)
    module.attention_path = path  # type: ignore[assignment] # never read here: compiled code would depend on it
    return output, None


AttentionInterface.register(IMPLEMENTATION, argonne_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)  # without it masks would arrive as None unnoticed
