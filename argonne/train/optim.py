"""Parameter groups and optimizers. Every state tensor has a flat name, so that a checkpoint needs no pickle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from argonne.config import OptimSection


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; a tied weight appears once, under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """Two groups, decayed and not. Matrices decay; gains and biases do not, unless `decay_all` says that all does."""
    decayed, plain = {}, {}
    for name, parameter in named_trainable(model).items():
        (decayed if optim.decay_all or parameter.ndim >= 2 else plain)[name] = parameter
    groups = [(decayed, optim.weight_decay), (plain, 0.0)]
    return [
        {"params": list(members.values()), "names": list(members), "weight_decay": decay, "lr": optim.lr}
        for members, decay in groups
        if members
    ]


def build_optimizer(model: nn.Module, optim: OptimSection) -> torch.optim.Optimizer:
    """Fused AdamW over the two groups, its state allocated at once so that a checkpoint loads into it in place."""
    optimizer = torch.optim.AdamW(parameter_groups(model, optim), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    for _, parameter in named_state_owners(optimizer):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def named_state_owners(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every state tensor under `optim.<state>.<parameter>`: the live tensors, not copies."""
    return {
        f"optim.{state}.{name}": tensor
        for name, parameter in named_state_owners(optimizer)
        for state, tensor in optimizer.state[parameter].items()
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def step_where_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> torch.Tensor:
    """Apply the update only where the gradient norm is finite; weights and moments stay untouched otherwise.

    The fused kernel reads `found_inf` on the device, so nothing waits for the host. Returns found_inf: 1.0 where the step was skipped.
    """
    found_inf = torch.logical_not(torch.isfinite(norm)).to(torch.float32)
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()
    return found_inf
