"""Compiling the decoder layers of a model, and going back to eager ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch._functorch import config as functorch_config


def compile_blocks(model: nn.Module, *, tensor: bool = False) -> None:
    """Compile each decoder layer in place, so that equal layers share one graph. Under tensor parallelism each shape
    gets graphs of its own: those for several shapes, as torch 2.13 makes them of the second, it fails to compile. Nor
    are they kept on the disk, where one group's graph, with its name in it, is taken for another's.
    """
    if tensor:
        functorch_config.enable_autograd_cache = False
    for layer in _layers(model):
        layer.compile(dynamic=False if tensor else None)


def undo_compile(model: nn.Module) -> None:
    """Back to eager layers."""
    for layer in _layers(model):
        layer._compiled_call_impl = None


@contextmanager
def eager_blocks(model: nn.Module) -> Iterator[None]:
    """Run layers eagerly while the block runs: the changing shapes of evaluation and generation would recompile what
    training uses.
    """
    layers = _layers(model)
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


def _layers(model: Any) -> list[Any]:
    return list(model.model.layers)
