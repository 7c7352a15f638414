"""int8 for the CPU: weights are rounded once, what they are multiplied with as it comes; each row has its own scale.
For one answer a matrix product waits for the memory, and int8 is a quarter of fp32.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import mmap
import platform
from typing import Any

import torch
from torch import Tensor, nn

from argonne.errors import InputError
from argonne.tokens.parsed import give_memory_back

X86 = ("x86_64", "AMD64")
LARGE_PAGE, ALIGNED = 2**21, 64  # bytes
LEAST = 1e-30  # a scale at least: a row of zeros has none
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Int8Linear(nn.Module):
    """x W^T + b with W (out, in) in int8. What a row of x gives does not depend on the others: it is rounded in steps
    of its own, and whole numbers are summed exactly.
    """

    def __init__(self, whole: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """whole: (out, in) int8, -127 to 127. scale: (out,), what each row of it is multiplied by."""
        from argonne.serve import int8  # numba, for those who round

        super().__init__()
        self.scale, self.bias = scale, bias
        self.out_features, self.in_features = whole.shape
        self.packed = int8.packed(whole)
        self._scales = torch.nn.functional.pad(scale, (0, self.packed.shape[0] * int8.LANES - len(scale)))
        self._unpacked, self._multiply = int8.unpacked, int8.multiply

    @classmethod
    def rounded(cls, weight: Tensor, bias: Tensor | None) -> Int8Linear:
        """Of a weight (out, in) in any floating dtype, to the nearest of 127 steps to each side of a row."""
        weight = weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp_min(LEAST)
        bias = None if bias is None else bias.detach().float()
        return cls((weight / scale[:, None]).round().to(torch.int8), scale, bias)

    @classmethod
    def of(cls, layers: list[Int8Linear]) -> Int8Linear:
        """Several with the same input, as one."""
        biases = [layer.bias for layer in layers if layer.bias is not None]
        whole, scale = torch.cat([layer.whole for layer in layers]), torch.cat([layer.scale for layer in layers])
        return cls(whole, scale, torch.cat(biases) if biases else None)

    @property
    def whole(self) -> Tensor:
        """(out, in) in int8."""
        return self._unpacked(self.packed, self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """(out, in): W as it is multiplied, in fp32."""
        return self.whole.float() * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.float()).to(x.dtype)

    def product(self, x: Tensor, **how: Any) -> Tensor:
        """Of x in fp32. how: what is done before and after in the same call, see int8.multiply."""
        found = self._multiply(x, self.packed, self._scales, self.out_features, self.in_features, **how)
        return found if self.bias is None else found.add_(self.bias)


class Part(nn.Module):
    """The outputs from `first` on, `count` of them, of a layer that has those of several."""

    def __init__(self, together: Int8Linear, first: int, count: int) -> None:
        super().__init__()
        self.together, self.first, self.count = together, first, count

    @property
    def weight(self) -> Tensor:
        return self.together.weight.narrow(0, self.first, self.count)

    @property
    def bias(self) -> Tensor | None:
        bias = self.together.bias
        return None if bias is None else bias.narrow(0, self.first, self.count)

    def forward(self, x: Tensor) -> Tensor:
        return self.together(x).narrow(-1, self.first, self.count)


def on_large_pages(tensors: list[Tensor]) -> list[Tensor]:
    """Copies, one behind the other in pages of 2 MB where the system has some: a processor that looks up few pages
    reads them a tenth to a quarter faster.
    """
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    places = [0, *itertools.accumulate(-(-size // ALIGNED) * ALIGNED for size in sizes)]
    memory = mmap.mmap(-1, places[-1] + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # there are none here: small ones do
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE_PAGE
    found = []
    for tensor, size, place in zip(tensors, sizes, places, strict=False):
        found.append(whole[start + place :][:size].view(tensor.dtype).view(tensor.shape).copy_(tensor))
    return found


def in_a_row(weights: list[Tensor]) -> Tensor | None:
    """The matrix that they are the parts of, where they lie one behind the other in one piece of memory."""
    first, end = weights[0], weights[0].data_ptr()
    held = first.untyped_storage().data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != held or not weight.is_contiguous():
            return None
        end += weight.numel() * weight.element_size()
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def pack(model: Any) -> None:
    """Lay the weights that have the same input side by side, in place: one product gives what several gave. All that
    are rounded then lie together.
    """
    for module in model.modules():
        for names in SAME_INPUT:
            linears: list[Any] = [getattr(module, name) for name in names if hasattr(module, name)]
            if len(linears) < 2:
                continue
            sizes = [linear.out_features for linear in linears]
            if all(isinstance(linear, Int8Linear) for linear in linears):
                together, first = Int8Linear.of(linears), 0
                for name, size in zip(names, sizes, strict=True):
                    setattr(module, name, Part(together, first, size))
                    first += size
            elif all(type(linear) is nn.Linear for linear in linears):
                parts = torch.cat([linear.weight.detach() for linear in linears]).split(sizes)
                for linear, part in zip(linears, parts, strict=True):
                    linear.weight = nn.Parameter(part, requires_grad=False)
    rounded = [module for module in model.modules() if isinstance(module, Int8Linear)]
    if rounded:
        for layer, moved in zip(rounded, on_large_pages([layer.packed for layer in rounded]), strict=True):
            layer.packed = moved
        give_memory_back()  # of the weights before


def quantize(model: Any) -> None:
    """Replace every linear layer of a model, in place. The rest of it is in fp32 then, as what is rounded and what is
    found are. Raises InputError where it cannot run.
    """
    device = next(model.parameters()).device
    if device.type != "cpu" or platform.machine() not in X86:
        raise InputError(
            f"--quantize int8: is for x86 CPUs, found {device.type} on {platform.machine()}; leave it out, or "
            "--device cpu"
        )
    try:
        importlib.import_module("numba")
    except ImportError:
        raise InputError("--quantize int8: needs numba, which is not installed; install argonne[int8]") from None
    with torch.no_grad():
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    setattr(module, name, Int8Linear.rounded(child.weight, child.bias))
        model.float()
