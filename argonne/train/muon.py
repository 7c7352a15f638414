"""Muon for the matrices of the layers, fused AdamW for everything else, as one optimizer.

Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). The momentum of a matrix is
replaced by an orthogonal matrix near it, found by five Newton-Schulz steps. Ours orthogonalises the whole matrix in a
dtype the recipe names, gathered where it is sharded; the work is spread over the ranks that hold the matrix and the
results are exchanged, so the update does not depend on the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalise(matrix: torch.Tensor, dtype: torch.dtype, eps: float = 1e-7) -> torch.Tensor:
    """An (m, n) matrix near U V^T of the singular value decomposition U S V^T of `matrix`, in `dtype`.

    Quintic Newton-Schulz iteration with the coefficients of the Muon paper: singular values end between about 0.7 and
    1.2.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    wide = x.size(0) <= x.size(1)
    x = x if wide else x.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class MuonAdamW(torch.optim.Optimizer):
    """Groups with `use_muon` hold layer matrices; the others are AdamW's, stepped by torch's fused kernel.

    `found_inf` (a tensor, 1.0 = skip) leaves every weight and state untouched, as fused AdamW does.
    """

    found_inf: torch.Tensor | None = None
    grad_scale: torch.Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        dtype: str,
        data_size: int = 1,
        data_group: dist.ProcessGroup | None = None,
    ) -> None:
        """data_size, data_group: how many ranks hold a copy of each plain matrix, and their group (None = torch's
        default group).
        """
        groups = list(groups)
        self._data_size, self._data_group = data_size, data_group
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._momentum = momentum
        super().__init__(groups, {})
        others = [group for group in self.param_groups if not group["use_muon"]]
        self._adamw = torch.optim.AdamW(others, betas=betas, eps=eps, fused=True) if others else None
        if self._adamw is not None:
            # One set of groups and one state: AdamW steps this optimizer's own.
            self._adamw.param_groups, self._adamw.state = others, self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, unless `found_inf` says 1.0."""
        found_inf = self.found_inf
        for group in self.param_groups:
            if group["use_muon"]:
                self._muon(group, found_inf)
        if self._adamw is not None:
            self._adamw.found_inf, self._adamw.grad_scale = found_inf, self.grad_scale  # type: ignore[attr-defined]
            self._adamw.step()

    def _muon(self, group: dict[str, Any], found_inf: torch.Tensor | None) -> None:
        members = [parameter for parameter in group["params"] if parameter.grad is not None]
        directions = []
        for parameter in members:
            buffer = self.state[parameter]["momentum"]
            moved = buffer.lerp(parameter.grad, 1 - self._momentum)
            directions.append(parameter.grad.lerp(moved, self._momentum))
            buffer.copy_(moved if found_inf is None else torch.where(found_inf > 0, buffer, moved))
        for parameter, update in zip(members, self._orthogonal(directions), strict=True):
            rate = group["lr"] * math.sqrt(max(1.0, parameter.size(0) / parameter.size(1)))
            new = parameter * (1 - group["lr"] * group["weight_decay"]) - rate * update.to(parameter.dtype)
            parameter.copy_(new if found_inf is None else torch.where(found_inf > 0, parameter, new))

    def _orthogonal(self, directions: list[torch.Tensor]) -> list[torch.Tensor]:
        """Every direction orthogonalised whole; a sharded one is gathered, and comes back as this rank's part, placed
        as it was.
        """
        sharded = [direction for direction in directions if isinstance(direction, DTensor)]
        if not sharded:
            return self._spread(directions, self._data_size, self._data_group)
        # One mesh for all: its innermost dimension shards; copies beside it (HSDP) do the same work on the same values.
        # At once so many whole matrices as there are ranks, each of which works on one.
        mesh = sharded[0].device_mesh
        size, group = mesh.size(mesh.ndim - 1), mesh.get_group(mesh.ndim - 1)
        order = sorted(range(len(directions)), key=lambda index: (-directions[index].numel(), index))
        found: dict[int, torch.Tensor] = {}
        for start in range(0, len(order), size):
            turn = order[start : start + size]
            updates = self._spread([_whole(directions[index]) for index in turn], size, group)
            for index, update in zip(turn, updates, strict=True):
                found[index] = _part_of(update, directions[index])
        return [found[index] for index in range(len(directions))]

    def _spread(self, directions: list[torch.Tensor], size: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
        """Orthogonalise every direction, each on one rank, largest first so that the shares are even; every rank gets
        all results.
        """
        if size == 1:
            return [orthogonalise(direction, self._dtype) for direction in directions]
        rank = dist.get_rank(group)
        order = sorted(range(len(directions)), key=lambda index: (-directions[index].numel(), index))
        results: list[torch.Tensor] = [torch.empty_like(direction, dtype=self._dtype) for direction in directions]
        for turn, index in enumerate(order):
            if turn % size == rank:
                results[index].copy_(orthogonalise(directions[index], self._dtype))
        works = [
            dist.broadcast(results[index], group=group, group_src=turn % size, async_op=True)
            for turn, index in enumerate(order)
        ]
        for work in works:
            work.wait()
        return results


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of it, placed as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
