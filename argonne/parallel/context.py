"""The tokens of a row are split over the ranks of a group: queries stay where they are, keys and values are gathered in
every layer, and their gradients summed at their owners. Beside it the model is replicated or sharded as ever.

Each rank holds one run of places, in order, all of one length; what is missing at the end of a row is filled up and
trains nothing. An objective sees what one process sees: labels of whole rows, and a head whose answers are of whole
rows. So it computes the same on every rank of the group, and the gradient that each takes from it is of its own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from argonne.errors import InputError
from argonne.keys import check_mesh
from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import Head, Loss, MicroBatch, Objective
from argonne.parallel.parallelise import Casts, Mode, Parallelised, Weights, replicate
from argonne.parallel.shard import shard

IGNORED = -100  # the label of what is not trained


def context(weights: Weights, mesh: Mesh, objective: Objective, casts: Casts) -> Parallelised:
    """Gradients are averaged over all ranks, those of the same rows included. Evaluation reads whole rows."""
    spread = shard if mesh.shard > 1 else replicate
    return spread(weights, mesh, objective, casts, partial(loss_of_part, mesh))


CONTEXT = Mode(check_mesh, context)


def loss_of_part(mesh: Mesh, model: nn.Module, micro: MicroBatch, objective: Objective) -> Loss:
    """The loss of whole rows, of which this rank runs its part forward."""
    ids = micro["input_ids"]
    own = Part(mesh, micro.get("position_ids", torch.arange(ids.shape[1])[None]))
    loss: Loss = model(
        input_ids=own.cut(ids, 0),
        position_ids=own.cut(own.positions, 0),
        attention_mask=own,
        use_cache=False,
        objective=lambda head, hidden: objective(HeadOfRows(head, own), hidden, micro),
    )
    return loss


@dataclass(frozen=True)
class Part:
    """This rank's tokens of rows, as the model's attention asks for them (argonne/model/attention.py).

    positions: (1 or B, length) of whole rows.
    """

    mesh: Mesh
    positions: Tensor

    @property
    def length(self) -> int:
        return self.positions.shape[1]

    @property
    def size(self) -> int:
        return -(-self.length // self.mesh.context)

    @property
    def missing(self) -> int:
        return self.size * self.mesh.context - self.length

    @property
    def first(self) -> int:
        return self.mesh.part * self.size

    def cut(self, rows: Tensor, fill: int) -> Tensor:
        """(B, length) -> (B, size)."""
        return F.pad(rows, (0, self.missing), value=fill)[:, self.first : self.first + self.size]

    @torch.compiler.disable(reason="a collective of a group of our own, between two compiled parts of a layer")
    def gather(self, part: Tensor) -> Tensor:
        """Keys and values (2, B, H, size, D) of each rank -> (2, B, H, group x size, D)."""
        whole: Tensor = _Gather.apply(part, self.mesh.rows)
        return whole

    def join(self, part: Tensor) -> Tensor:
        """(..., size) of every rank of the group, in order: (..., group x size). Backward each keeps the gradient of
        its own: what is made of it is made on all of them alike.
        """
        parts = list(_gathered(part.detach(), self.mesh.rows))
        parts[self.mesh.part] = part
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class HeadOfRows:
    """A head over this rank's hidden states (B, size, H) that takes labels (B, length) and answers for whole rows."""

    head: Head
    own: Part

    @property
    def z_loss(self) -> float:
        return self.head.z_loss

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    def of_part(self, weight: Tensor, first: int, group: dist.ProcessGroup) -> HeadOfRows:
        return HeadOfRows(self.head.of_part(weight, first, group), self.own)

    def logits(self, hidden: Tensor) -> Tensor:
        raise InputError(
            f"parallel.context: found {self.own.mesh.context}, expected 1: this stage's loss reads logits itself, and "
            "no rank has those of whole rows"
        )

    def summed_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self.loss_and_penalty(hidden, labels)[0]

    def loss_and_penalty(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mine = torch.stack(self.head.loss_and_penalty(hidden, self.own.cut(labels, IGNORED)))
        total, penalty = self.own.join(mine[:, None])
        return total.sum(), penalty.detach().sum()

    def token_log_probs(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mine = torch.stack(self.head.token_log_probs(hidden, self.own.cut(labels, IGNORED)))
        log_p, log_z = self.own.join(mine)[..., : self.own.length]
        return log_p, log_z


class _Gather(torch.autograd.Function):
    """Backward, what the queries of all ranks make of a part is summed where it lies."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(part, group).movedim(0, 3).flatten(3, 4)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        parts = [part.contiguous() for part in gradient.chunk(dist.get_world_size(ctx.group), dim=3)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own, None


def _gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(...) of each rank -> (group, ...)."""
    whole = part.new_empty(dist.get_world_size(group), *part.shape)
    dist.all_gather(list(whole.unbind()), part.contiguous(), group=group)
    return whole
