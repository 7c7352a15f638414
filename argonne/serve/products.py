"""Matrix products of a pass for serving, with the little work before and behind each. Of rounded weights all of it is
one call: a step of a small model is mostly calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argonne.model.layers import ArgonneRMSNorm
from argonne.model.loss import product
from argonne.serve.quantize import Int8Linear, Part, in_a_row

Product = Callable[[Tensor], Tensor]
Sum = Callable[[Tensor, Tensor], Tensor]
LARGE = 2**19  # weights: below, the call itself takes longest


def joined(*linears: nn.Module) -> Product:
    """Their outputs side by side."""
    if isinstance(linears[0], Part):
        return linears[0].together.forward
    if isinstance(linears[0], Int8Linear):
        rounded = [linear.forward for linear in linears]
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


def rounded_in_one(*linears: nn.Module) -> Int8Linear | None:
    """The rounded layer that gives all their outputs, whose call can do more."""
    if isinstance(linears[0], Part):
        return linears[0].together
    return linears[0] if len(linears) == 1 and isinstance(linears[0], Int8Linear) else None


def entering(norm: nn.Module, *linears: nn.Module) -> Product:
    """Their outputs side by side, of the normed x."""
    rounded = rounded_in_one(*linears)
    if rounded is not None and isinstance(norm, ArgonneRMSNorm):
        return partial(rounded.product, norm=(norm.weight, norm.variance_epsilon))
    before, product = norm_of(norm), joined(*linears)
    return lambda x: product(before(x))


def leaving(linear: nn.Module, norm: nn.Module | None, before: Product | None = None) -> Sum:
    """hidden + the outputs, normed where there is a norm, of what `before` makes of x: (x, hidden)."""
    straight, rounded = joined(linear), rounded_in_one(linear)
    if rounded is not None and before in (None, silu_of_first):
        together = partial(rounded.product, gated=before is silu_of_first)
        if norm is None:
            return lambda x, hidden: together(x, plus=hidden)
        straight, before = together, None
    behind = None if norm is None else norm_of(norm)

    def added(x: Tensor, hidden: Tensor) -> Tensor:
        found = straight(x if before is None else before(x))
        return hidden + (found if behind is None else behind(found))

    return added


def silu_of_first(x: Tensor) -> Tensor:
    """silu(gate) x up, of both side by side."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


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
