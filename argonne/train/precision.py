"""Mixed precision: autocast over fp32 masters, fp16 with torch's GradScaler, or weights in bf16 throughout."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from argonne.errors import InputError


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 on CUDA (where the card has it) and fp32 elsewhere. A precision the device cannot run is an InputError."""
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if name in ("bf16", "bf16_full") and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError(f"train.precision: found {name}, but {torch.cuda.get_device_name(device)} has no bf16; use fp16 or fp32")
    return name


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """What matrix products and attention run in under a precision."""
    kinds = {"bf16": torch.bfloat16, "bf16_full": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return kinds[resolve_precision(name, device)]


class Precision:
    """The casts of one session and, for fp16, the loss scale (kept in the checkpoint through `state`)."""

    def __init__(self, name: str, device: torch.device, scaler_state: dict[str, Any] | None = None) -> None:
        self.name, self.device = resolve_precision(name, device), device
        self._scaler = torch.amp.GradScaler(device.type) if self.name == "fp16" else None
        if self._scaler is not None and scaler_state:
            self._scaler.load_state_dict(scaler_state)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if self.name not in kinds:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=kinds[self.name])

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self._scaler is None else self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> torch.Tensor:
        """Update where finite; returns 1.0 where the step was skipped, on the device."""
        if self._scaler is None:
            return step_where_finite(optimizer, norm)
        self._scaler.step(optimizer)
        self._scaler.update()
        return torch.logical_not(torch.isfinite(norm)).to(torch.float32)

    def state(self) -> dict[str, Any]:
        """The loss scale and its growth count, as JSON values."""
        return {} if self._scaler is None else dict(self._scaler.state_dict())


def step_where_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> torch.Tensor:
    """Apply the update only where the gradient norm is finite; weights and moments stay untouched otherwise.

    The fused kernel reads `found_inf` on the device, so nothing waits for the host. Returns found_inf: 1.0 where the step was skipped.
    """
    found_inf = torch.logical_not(torch.isfinite(norm)).to(torch.float32)
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()
    return found_inf
