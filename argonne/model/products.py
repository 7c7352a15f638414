"""Matrix products of training in fp32 by oneDNN, on processors where it is faster than MKL, which torch takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from argonne.model.loss import product


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
        rows = upstream.reshape(-1, upstream.shape[-1])
        on_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return on_x, on_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


class LinearByOneDNN(nn.Linear):
    """A linear layer of plain fp32 tensors on the CPU, outside autocast and compiled code; of others, torch's own."""

    onednn = True  # what the loss asks the layer of the head

    def forward(self, input: Tensor) -> Tensor:
        plain = type(input) is Tensor and type(self.weight) in (Tensor, nn.Parameter)
        narrow = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        if not plain or narrow or not (input.dtype == self.weight.dtype == torch.float32) or input.device.type != "cpu":
            return super().forward(input)
        found: Tensor = _Linear.apply(input, self.weight, self.bias)
        return found


def multiply_by_onednn(model: nn.Module) -> None:
    """From now on, in every linear layer, where this torch has oneDNN. Names, weights and what is saved stay."""
    for module in model.modules() if torch.backends.mkldnn.is_available() else ():
        if type(module) is nn.Linear:
            module.__class__ = LinearByOneDNN
