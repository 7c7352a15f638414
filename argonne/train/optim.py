"""Parameter groups, optimizers, and the precision that they step in. Every state tensor has a flat name: a checkpoint
needs no pickle.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from argonne.config import OptimSection
from argonne.parallel.mesh import Mesh
from argonne.plan import devices
from argonne.plan.processor import multiplies_bf16
from argonne.train.muon import MuonAdamW

DTYPES = {"bf16": torch.bfloat16, "bf16_full": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parameter_groups(model: nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """AdamW's groups, decayed and not, and for Muon a group of the layers' matrices before them. Each keeps its own
    peak rate.

    Matrices decay; embeddings (a head that shares their weight too), gains and biases do not, unless `decay_all` says
    that all does.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    muon: dict[str, nn.Parameter] = {}
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():  # a tied weight once, under its first name
        if not parameter.requires_grad:
            continue
        if optim.name == "muon" and parameter.ndim == 2 and ".layers." in name:
            muon[name] = parameter
        else:
            decays = optim.decay_all or (parameter.ndim >= 2 and id(parameter) not in embeddings)
            (decayed if decays else plain)[name] = parameter
    groups = [
        (muon, optim.weight_decay, optim.muon_lr),
        (decayed, optim.weight_decay, optim.lr),
        (plain, 0.0, optim.lr),
    ]
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

    After parallelising, which may have replaced the parameters. mesh: where Muon finds the ranks to share its work
    with.
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


def resolve_precision(name: str, device: torch.device, width: int) -> str:
    """What train.precision comes to on this machine, for a model of hidden size `width`. A precision that the device
    cannot run is an InputError.
    """
    if device.type == "cuda":
        found = torch.cuda.get_device_name(device)
        return devices.resolve_precision(name, found, has_bf16=torch.cuda.is_bf16_supported(), width=width)
    has_bf16 = device.type == "cpu" and multiplies_bf16()
    return devices.resolve_precision(name, "cpu", has_bf16=has_bf16, width=width)


class Precision:
    """The casts of one session and, for fp16, the loss scale (kept in the checkpoint through `state`).

    dtype: what matrix products and attention run in.
    """

    def __init__(self, name: str, device: torch.device, scaler_state: dict[str, Any] | None = None) -> None:
        """name: of train.precision, but "auto" (`resolve_precision` says what that is)."""
        self.name, self.device, self.dtype = name, device, DTYPES[name]
        self._scaler = torch.amp.GradScaler(device.type) if self.name == "fp16" else None
        if self._scaler is not None and scaler_state:
            self._scaler.load_state_dict(scaler_state)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.name not in ("bf16", "fp16"):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

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

    The fused kernel reads `found_inf` on the device, so nothing waits for the host. Returns found_inf: 1.0 where the
    step was skipped.
    """
    found_inf = torch.logical_not(torch.isfinite(norm)).to(torch.float32)
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()
    return found_inf
