"""Parameter groups and optimizers. Every state tensor has a flat name, so that a checkpoint needs no pickle."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from argonne.config import OptimSection
from argonne.parallel.mesh import Mesh
from argonne.train.muon import MuonAdamW


def parameter_groups(model: nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """AdamW's groups, decayed and not, and for Muon a group of the layers' matrices before them. Each keeps its own peak rate.

    Matrices decay; gains and biases do not, unless `decay_all` says that all does.
    """
    muon: dict[str, nn.Parameter] = {}
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():  # a tied weight once, under its first name
        if not parameter.requires_grad:
            continue
        if optim.name == "muon" and parameter.ndim == 2 and ".layers." in name:
            muon[name] = parameter
        else:
            (decayed if optim.decay_all or parameter.ndim >= 2 else plain)[name] = parameter
    groups = [(muon, optim.weight_decay, optim.muon_lr), (decayed, optim.weight_decay, optim.lr), (plain, 0.0, optim.lr)]
    return [
        {
            "params": list(members.values()),
            "names": list(members),
            "weight_decay": decay,
            "lr": peak,
            "peak": peak,
            "use_muon": members is muon,
        }
        for members, decay, peak in groups
        if members
    ]


def build_optimizer(model: nn.Module, optim: OptimSection, mesh: Mesh | None = None) -> torch.optim.Optimizer:
    """The recipe's optimizer, its state allocated at once so that a checkpoint loads into it in place.

    After parallelising, which may have replaced the parameters. mesh: where Muon finds the ranks to share its work with.
    """
    groups = parameter_groups(model, optim)
    optimizer: torch.optim.Optimizer
    if optim.name == "muon":
        optimizer = MuonAdamW(
            groups,
            betas=optim.betas,
            eps=optim.eps,
            momentum=optim.muon_momentum,
            dtype=optim.muon_dtype,
            data_size=1 if mesh is None else mesh.data_size,
            data_group=None if mesh is None else mesh.data,
        )
    else:
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if group["use_muon"]:
                state["momentum"] = torch.zeros_like(parameter)
            else:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
    return optimizer


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every state tensor under `optim.<state>.<parameter>`: the live tensors, not copies."""
    return {
        f"optim.{state}.{name}": tensor
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for state, tensor in optimizer.state[parameter].items()
    }
