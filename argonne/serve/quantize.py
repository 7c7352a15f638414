"""int8 for the CPU: weights are rounded once, what they are multiplied with as it comes; each row has its own scale.
For one answer a matrix product waits for the memory, and int8 is a quarter of fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from argonne.errors import InputError

LEAST = 1e-30  # a scale at least: a row of zeros has none
FEW = 8  # rows
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def levels() -> int:
    """Of a rounded activation, to each side. Without VNNI two products are summed in 16 bits, which 8 bits would
    overflow in silence.
    """
    return 127 if torch.cpu._is_vnni_supported() else 63


class Int8Linear(nn.Module):
    """x W^T + b with W (out, in) in int8. What a row of x gives does not depend on the others: its scale is its own.

    A few rows wait for the memory: there x is rounded to bf16 only. Many rows are rounded to whole numbers.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.in_features, self.levels = weight.shape[1], levels()
        self.scale = (weight.abs().amax(1) / 127).clamp_min(LEAST)
        self.whole = (weight / self.scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(self.whole, None)
        self.ones, self.zeros = torch.ones(1), torch.zeros(1, dtype=torch.int32)
        self.offset = self.levels * self.whole.sum(1, dtype=torch.int32).float()
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return several([self])(x)

    def of_many(self, whole: Tensor, step: Tensor) -> Tensor:
        """(rows, in) uint8 around `levels`, and the step of each row, to (rows, out)."""
        found: Tensor = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, 0, self.packed, self.ones, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return (found - self.offset) * self.scale * step

    @property
    def weight(self) -> Tensor:
        """(out, in): W as it is multiplied, in fp32."""
        return self.whole.float() * self.scale[:, None]


def in_a_row(weights: list[Tensor]) -> Tensor | None:
    """The matrix that they are the parts of, where they lie one behind the other in one piece of memory."""
    first, end = weights[0], weights[0].data_ptr()
    held = first.untyped_storage().data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != held or not weight.is_contiguous():
            return None
        end += weight.numel() * weight.element_size()
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def lay_side_by_side(model: nn.Module, name: str) -> None:
    """Move what layers with the same input hold under this name into one piece of memory, one behind the other."""
    for module in model.modules():
        for names in SAME_INPUT:
            linears: list[Any] = [getattr(module, one) for one in names if hasattr(module, one)]
            if len(linears) > 1:
                held = [getattr(linear, name).detach() for linear in linears]
                for linear, part in zip(linears, torch.cat(held).split([len(one) for one in held]), strict=True):
                    setattr(linear, name, nn.Parameter(part, requires_grad=False) if name == "weight" else part)


def several(linears: list[Int8Linear]) -> Callable[[Tensor], Tensor]:
    """Their outputs side by side; what they are multiplied with is rounded once."""
    first, biases = linears[0], [linear.bias for linear in linears if linear.bias is not None]
    together = in_a_row([linear.whole for linear in linears])
    weights = torch.cat([linear.whole for linear in linears]) if together is None else together
    scale, bias = torch.cat([linear.scale for linear in linears]), torch.cat(biases) if biases else None
    ones = torch.ones(len(weights), dtype=torch.bfloat16)

    def product(x: Tensor) -> Tensor:
        flat = x.reshape(-1, first.in_features)
        if len(flat) <= FEW:
            found = torch._weight_int8pack_mm(flat.to(torch.bfloat16), weights, ones).float() * scale
        else:
            step = (flat.float().abs().amax(-1, keepdim=True) / first.levels).clamp_min(LEAST)
            whole = torch.add(flat / step, first.levels + 0.5).to(torch.uint8)  # cut off, which rounds half up
            found = torch.cat([linear.of_many(whole, step) for linear in linears], -1)
        found = found if bias is None else found + bias
        return found.view(*x.shape[:-1], -1).to(x.dtype)

    return product


def quantize(model: Any) -> None:
    """Replace every linear layer of a model, in place. The embedding stays as it is. Raises InputError where it cannot
    run.
    """
    device = next(model.parameters()).device
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise InputError(
            f"--quantize int8: is for CPUs with oneDNN, found {device.type}; leave it out, or --device cpu"
        )
    with torch.no_grad():
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    setattr(module, name, Int8Linear(child))
        lay_side_by_side(model, "whole")
