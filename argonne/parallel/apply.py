"""Parallelism applied to a model: torch's own engines over our mesh."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from argonne.parallel.mesh import Mesh


def replicate(model: nn.Module, mesh: Mesh) -> nn.Module:
    """One copy a rank, gradients averaged over ranks in the last backward pass of a step; the model itself on a mesh of one."""
    if mesh.world_size == 1:
        return model
    # Nothing in the model's buffers is trained: no copies before each forward. torch 2.13 renamed the switch.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    devices = [mesh.device] if mesh.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **buffers)


def compile_blocks(model: nn.Module, *, wanted: bool) -> bool:
    """Compile each decoder layer in place, so that equal layers share one graph; returns whether anything is compiled."""
    if wanted:
        for layer in _plain(model).model.layers:
            layer.compile()
    return wanted


def undo_compile(model: nn.Module) -> None:
    """Back to eager layers."""
    for layer in _plain(model).model.layers:
        layer._compiled_call_impl = None


@contextmanager
def eager_blocks(model: nn.Module) -> Iterator[None]:
    """Run layers eagerly while the block runs: the changing shapes of evaluation and generation would recompile what training uses."""
    layers = list(_plain(model).model.layers)
    compiled = [layer._compiled_call_impl for layer in layers]
    try:
        for layer in layers:
            layer._compiled_call_impl = None
        yield
    finally:
        for layer, call in zip(layers, compiled, strict=True):
            layer._compiled_call_impl = call


def is_compiler_error(error: BaseException) -> bool:
    """Whether an exception comes out of the compiler and not out of the model."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton", "torch.fx"))


def _plain(model: nn.Module) -> Any:
    return getattr(model, "module", model)
