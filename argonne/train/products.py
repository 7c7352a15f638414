"""Matrix products of training in fp32 by oneDNN where it is the faster library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from argonne.plan.processor import AMD, vendor


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN: x (.., in), W (out, in) in any layout."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


class _Linear(torch.autograd.Function):
    """x W^T + b and its derivatives. That of W sums over all tokens, in which MKL is as fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        on_x = product(upstream, weight.t()) if ctx.needs_input_grad[0] else None
        rows = upstream.flatten(0, -2)
        on_weight = rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return on_x, on_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


class ByOneDNN(TorchFunctionMode):
    """While it is on, linear layers of fp32 CPU tensors are multiplied, forward and backward, by oneDNN."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and not kwargs and _can_take(*args):
            return _Linear.apply(args[0], args[1], args[2] if len(args) > 2 else None)
        return function(*args, **(kwargs or {}))


def _can_take(x: Any, weight: Any, bias: Any = None) -> bool:
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    return plain and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"


def faster_by_onednn(device: torch.device) -> bool:
    """MKL, which torch takes, is tuned for Intel's processors."""
    return device.type == "cpu" and vendor() == AMD and torch.backends.mkldnn.is_available()
