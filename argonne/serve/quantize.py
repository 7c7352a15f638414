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


def levels() -> int:
    """Of a rounded activation, to each side. Without VNNI two products are summed in 16 bits, which 8 bits would
    overflow in silence.
    """
    return 127 if torch.cpu._is_vnni_supported() else 63


class Int8Linear(nn.Module):
    """x W^T + b with W (out, in) in int8. What a row of x gives does not depend on the others: its scale is its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.in_features, self.levels = weight.shape[1], levels()
        self.scale = (weight.abs().amax(1) / 127).clamp_min(LEAST)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack((weight / self.scale[:, None]).round().to(torch.int8), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, in) uint8 around `levels`, and the step of each row, (rows, 1)."""
        step = (x.abs().amax(-1, keepdim=True) / self.levels).clamp_min(LEAST)
        return torch.add(x / step, self.levels + 0.5).to(torch.uint8), step  # cut off, which rounds half up

    def product(self, rounded: Tensor, step: Tensor) -> Tensor:
        found = self._times(rounded, self.levels) * step
        return found if self.bias is None else found + self.bias

    def _times(self, rounded: Tensor, zero: int) -> Tensor:
        found: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, zero, self.packed, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return found

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).float()
        return self.product(*self.rounded(flat)).view(*x.shape[:-1], -1).to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """(out, in): W as it is multiplied, in fp32."""
        return self._times(torch.eye(self.in_features).to(torch.uint8), 0).t()


def several(linears: list[Int8Linear]) -> Callable[[Tensor], Tensor]:
    """Their outputs side by side; what they are multiplied with is rounded once."""
    first = linears[0]

    def product(x: Tensor) -> Tensor:
        rounded, step = first.rounded(x.reshape(-1, first.in_features).float())
        found = torch.cat([linear.product(rounded, step) for linear in linears], -1)
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
