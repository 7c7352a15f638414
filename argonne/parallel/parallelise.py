"""How a model is spread over the mesh. A mode is a page: what it refuses, and what it makes of weights. Here: one copy
a rank.

Parallelising comes before the optimizer, which must find the parameters that will really be trained.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from argonne.config import ParallelSection
from argonne.keys import check_mesh
from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import Loss, MicroBatch, Objective


@dataclass
class Sums:
    """What the micro-batches of one step came to on this rank, on its device; added over all ranks they are the global
    batch's. total: without penalties.

    rows: (row losses, micro-batch) of each micro-batch whose objective told them.
    """

    total: Tensor
    rows: list[tuple[Tensor, MicroBatch]] = field(default_factory=list)
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def add(self, loss: Loss, micro: MicroBatch) -> None:
        self.total += loss.total.detach() - loss.penalty
        if loss.rows is not None:
            self.rows.append((loss.rows, micro))
        for name, (value, count) in loss.metrics.items():
            pair = torch.stack([value.detach().to(torch.float32), count.detach().to(torch.float32)])
            self.metrics[name] = self.metrics[name] + pair if name in self.metrics else pair


class Casts(Protocol):
    """Mixed precision as a step uses it."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]: ...
    def scale(self, loss: Tensor) -> Tensor: ...


class Evaluate(Protocol):
    def __call__(self, micro: MicroBatch, other: Objective | None = None, /) -> Loss: ...


@dataclass(frozen=True)
class Parallelised:
    """A model on its mesh, as the loop drives it.

    model: what is stepped. plain: the module whose tensors a checkpoint holds, under their one name on every mesh.
    forward_backward(micro_batches, count): gradients of (loss total of the global batch / count), and this rank's sums.
    gradient_norm(parameters): the 2-norm over the whole model, a plain 0-dim tensor, equal on every rank.
    evaluate(micro, other): the objective, or another one, without gradients; the same answer on every rank that takes
    part.
    forward: whether `plain` can be called by one rank "alone", by all "together" (a forward pass is a collective), or
    "never".
    """

    model: nn.Module
    plain: nn.Module
    forward_backward: Callable[[Sequence[MicroBatch], int], Sums]
    gradient_norm: Callable[[Sequence[Tensor]], Tensor]
    evaluate: Evaluate
    forward: Literal["alone", "together", "never"] = "alone"


class Weights(Protocol):
    """A model that takes no memory until it is filled. fill(device, ended): with its tensors; `ended` gets each decoder
    layer once it has all of its own, and may take them apart. model: empty. config: of the model. of(names): those
    tensors alone; the modules of others may be taken out of the model.
    """

    @property
    def model(self) -> Any: ...

    @property
    def config(self) -> Any: ...

    def of(self, names: Set[str], /) -> Weights: ...

    def fill(self, device: torch.device | str, ended: Callable[[nn.Module], object] = ..., /) -> nn.Module: ...


@dataclass(frozen=True)
class Mode:
    """A way to spread a model. check(parallel, workers) raises InputError for degrees that it would not honour, before
    any worker starts.
    """

    check: Callable[[ParallelSection, int], None]
    parallelise: Callable[[Weights, Mesh, Objective, Casts], Parallelised]


# (model, micro-batch, objective) -> the loss of one forward pass, the same on all ranks that read these rows.
Pass = Callable[[nn.Module, MicroBatch, Objective], Loss]


def loss_of(model: nn.Module, micro: MicroBatch, objective: Objective) -> Loss:
    """One forward pass of a whole model, through its own call, so that whatever is wrapped around it sees it."""
    loss: Loss = model(
        input_ids=micro["input_ids"],
        position_ids=micro.get("position_ids"),
        use_cache=False,
        objective=lambda head, hidden: objective(head, hidden, micro),
    )
    return loss


def replicate(
    weights: Weights, mesh: Mesh, objective: Objective, casts: Casts, forward_pass: Pass = loss_of
) -> Parallelised:
    """One copy a rank, gradients averaged over ranks in the last backward pass of a step; the model itself on a mesh of
    one.
    """
    model = weights.fill(mesh.device)
    if mesh.world_size == 1:
        return in_one_call(model, model, mesh, objective, casts)
    stepped = _distributed(model, mesh)
    return in_one_call(
        stepped,
        model,
        mesh,
        objective,
        casts,
        sync=lambda wanted: contextlib.nullcontext() if wanted else stepped.no_sync(),
        forward_pass=forward_pass,
    )


def in_one_call(
    stepped: nn.Module,
    plain: nn.Module,
    mesh: Mesh,
    objective: Objective,
    casts: Casts,
    *,
    sync: Callable[[bool], contextlib.AbstractContextManager[Any]] = lambda wanted: contextlib.nullcontext(),
    forward: Literal["alone", "together"] = "alone",
    forward_pass: Pass = loss_of,
) -> Parallelised:
    """For every mode in which one call of `stepped` is a whole forward pass. sync(wanted): around a micro-batch,
    whether ranks reduce then. forward_pass: of training; evaluation reads whole rows.
    """

    def forward_backward(micro_batches: Sequence[MicroBatch], count: int) -> Sums:
        scale = mesh.averaged / max(1, count)
        sums = Sums(torch.zeros((), device=mesh.device, dtype=torch.float32))
        last = len(micro_batches) - 1
        for index, on_host in enumerate(micro_batches):
            micro = placed(on_host, mesh.device)
            with sync(index == last):
                with casts.autocast():
                    loss = forward_pass(stepped, micro, objective)
                casts.scale(loss.total * scale).backward()
            if mesh.speaks_for_its_rows:
                sums.add(loss, micro)
        return sums

    def evaluate(micro: MicroBatch, other: Objective | None = None) -> Loss:
        with torch.no_grad(), casts.autocast():
            return loss_of(plain, placed(micro, mesh.device), other or objective)

    return Parallelised(stepped, plain, forward_backward, total_norm, evaluate, forward)


REPLICATED = Mode(check_mesh, replicate)


def _distributed(model: nn.Module, mesh: Mesh) -> DistributedDataParallel:
    # Nothing in the model's buffers is trained: no copies before each forward. torch 2.13 renamed the switch.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    devices = [mesh.device] if mesh.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **buffers)


def placed(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """A micro-batch where the model wants it: positions stay on the host, whose documents the model reads without
    waiting for a device.
    """
    return {
        name: tensor if name == "position_ids" else tensor.to(device, non_blocking=True)
        for name, tensor in micro.items()
    }


def total_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients; whole also where they are sharded tensors."""
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole
