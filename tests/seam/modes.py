"""A toy mode: a pipeline of two processes. What the real one will be, on a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from argonne.config import ParallelSection
from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import Loss, MicroBatch, Objective
from argonne.parallel.parallelise import Casts, Mode, Parallelised, Sums, Weights, placed


def anything(parallel: ParallelSection, workers: int) -> None:
    """A toy refuses nothing."""


class First(nn.Module):
    """Embedding and the first layers."""

    def __init__(self, model: Any, cut: int) -> None:
        super().__init__()
        self.model, self.cut = model, cut

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.run_layers(self.model.embed(input_ids), 0, self.cut)


class Last(nn.Module):
    """The other layers and the final norm; the head is the objective's."""

    def __init__(self, model: Any, cut: int) -> None:
        super().__init__()
        self.model, self.cut = model, cut

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model.model.norm(self.model.run_layers(hidden, self.cut))


def pipeline(weights: Weights, mesh: Mesh, objective: Objective, casts: Casts) -> Parallelised:
    """Two stages under GPipe. The tied embedding lies on both: its gradients are summed, and the norm
    counts it once.
    """
    model: Any = weights.fill(mesh.device)
    layers, cut, first = model.model.layers, len(model.model.layers) // 2, mesh.rank == 0
    for index in range(len(layers)):
        if (index < cut) != first:
            layers[index] = nn.Identity()
    if first:
        model.model.norm = nn.Identity()
    stage = PipelineStage(First(model, cut) if first else Last(model, cut), mesh.rank, 2, mesh.device)
    tied = model.model.embed_tokens.weight

    def forward_backward(micro_batches: Sequence[MicroBatch], count: int) -> Sums:
        micros, found = [placed(micro, mesh.device) for micro in micro_batches], dict[int, Loss]()

        def loss_of_micro(hidden: Tensor, number: Tensor) -> Tensor:
            # torch also calls it on an empty buffer, to learn the shapes: the real micro-batch comes later and takes
            # the place.
            found[int(number)] = objective(model.head, hidden, micros[int(number)])
            return found[int(number)].total / max(1, count)

        schedule = ScheduleGPipe(stage, len(micros), loss_fn=loss_of_micro, scale_grads=False)
        if first:
            schedule.step(torch.cat([micro["input_ids"] for micro in micros]))
        else:
            schedule.step(target=torch.arange(len(micros)))
        tied.grad = torch.zeros_like(tied) if tied.grad is None else tied.grad
        dist.all_reduce(tied.grad)
        sums = Sums(torch.zeros(()))
        for number, loss in sorted(found.items()):
            sums.add(loss, micros[number])
        return sums

    def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
        mine = [p.grad for p in parameters if p.grad is not None and (first or p is not tied)]
        squares = torch.stack([grad.square().sum() for grad in mine]).sum()
        dist.all_reduce(squares)
        return squares.sqrt()

    @torch.no_grad()
    def evaluate(micro: MicroBatch, other: Objective | None = None) -> Loss:
        if first:
            dist.send(First(model, cut)(micro["input_ids"]), 1)
        box: list[Any] = [None]
        if not first:
            hidden = torch.empty(*micro["input_ids"].shape, model.config.hidden_size)
            dist.recv(hidden, 0)
            box = [(other or objective)(model.head, Last(model, cut)(hidden), micro)]
        dist.broadcast_object_list(box, src=1)
        return box[0]

    return Parallelised(model, model, forward_backward, gradient_norm, evaluate, "never")


PIPELINED = Mode(anything, pipeline)
