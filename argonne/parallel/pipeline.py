"""The layers of a model over the ranks of a group, in stages through which micro-batches follow one another: torch's
pipelining. Within a stage the model is copied, sharded or split as ever.

Both ends hold a tied weight: it has one name, one gradient, and one share of the norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleLoopedBFS
from torch.distributed.tensor import DTensor

from argonne.errors import InputError
from argonne.keys import check_heads, check_mesh
from argonne.parallel.compile import is_compiler_error
from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import Loss, MicroBatch, Objective
from argonne.parallel.parallelise import Casts, Mode, Parallelised, Sums, Weights, placed, total_norm
from argonne.parallel.tensor import (
    filled,
    over_the_vocabulary,
    parted,
    quiet_redistribution,
    split_ends,
    split_layer,
    whole,
)
from argonne.plan.shape import shape_of
from argonne.plan.stages import runs_of


class Stage(nn.Module):
    """Some layers of a model, and what stands before the first or behind the last: its parameters are the model's.

    Micro-batches come in order. A first stage reads them, a last one gives (1,), the total of the loss, and keeps the
    whole of it in `losses`; between them hidden states (B, T, H) travel.
    """

    def __init__(self, model: Any, layers: range, casts: Casts, tensors: DeviceMesh | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(model.model.layers[index] for index in layers)
        self.is_first, self.is_last = layers.start == 0, layers.stop == len(model.model.layers)
        ends = [model.model.norm, model.lm_head] if self.is_last else []
        if self.is_first or (self.is_last and model.config.tie_word_embeddings):
            ends.append(model.model.embed_tokens)
        if self.is_first and model.config.position_embedding == "learned":
            ends.append(model.model.embed_positions)
        self.ends = nn.ModuleList(ends)
        self.run, self.casts, self.tensors = layers, casts, tensors
        self._whole = (model,)  # not a part of this one
        self._coming: Iterator[tuple[MicroBatch, MicroBatch]] = iter(())

    def begin(self, rows: Sequence[MicroBatch], micro_batches: Sequence[MicroBatch], objective: Objective) -> None:
        """rows: what the model reads of the micro-batches, perhaps filled up to a longer length."""
        self._coming, self._objective = zip(rows, micro_batches, strict=True), objective
        self.losses = list[Loss]()

    def forward(self, hidden: Tensor | None = None) -> Tensor:
        (model,), (rows, micro) = self._whole, next(self._coming)
        positions, length = rows.get("position_ids"), micro["input_ids"].shape[1]
        with self.casts.autocast():
            if hidden is None:
                hidden = model.embed(rows["input_ids"], positions)
            elif self.tensors is not None:
                hidden = parted(hidden, self.tensors)
            hidden = model.run_layers(hidden, self.run.start, self.run.stop, position_ids=positions)
            if not self.is_last:
                return hidden if self.tensors is None else whole(hidden)
            self.losses.append(self._objective(model.head, model.model.norm(hidden)[:, :length], micro))
        return torch.stack([self.losses[-1].total])


def take_out(model: Any, stages: Sequence[range]) -> None:
    """Leave of a model only these stages' modules, under their names. A tied weight is the embedding's at both ends."""
    first, last = stages[0].start == 0, stages[-1].stop == len(model.model.layers)
    for index in range(len(model.model.layers)):
        if not any(index in layers for layers in stages):
            model.model.layers[index] = nn.Identity()
    if not (first or (last and model.config.tie_word_embeddings)):
        model.model.embed_tokens = nn.Identity()
    if not first and model.config.position_embedding == "learned":
        model.model.embed_positions = nn.Identity()
    if not last:
        model.model.norm, model.lm_head = nn.Identity(), nn.Identity()


class Pipeline:
    """This rank's stages, as the loop drives them."""

    def __init__(self, weights: Weights, mesh: Mesh, objective: Objective, casts: Casts) -> None:
        self.mesh, self.objective, self.casts, self.scale = mesh, objective, casts, 1.0
        model: Any = weights.model
        self.count = mesh.pipeline * mesh.stages
        runs = runs_of(shape_of(model.config.to_dict()), self.count)[mesh.stage :: mesh.pipeline]
        sizes = (mesh.pipeline, mesh.data_size // mesh.shard, mesh.shard, mesh.inner)
        devices = init_device_mesh(mesh.device.type, sizes, mesh_dim_names=("pipeline", "replicate", "shard", "tensor"))
        self.group = devices["pipeline"].get_group()
        self.tensors = devices["tensor"] if mesh.inner > 1 else None
        take_out(model, runs)
        self.model: Any = self._spread(weights, devices)
        self.hidden, self.dtype = model.config.hidden_size, next(self.model.parameters()).dtype
        self.stages = [Stage(self.model, layers, casts, self.tensors) for layers in runs]
        if mesh.data_size * mesh.inner > 1:
            for stage in self.stages:
                fully_shard(stage, mesh=devices[_data_of(mesh)])
        self.tied = model.config.tie_word_embeddings and (self.stages[0].is_first or self.stages[-1].is_last)
        self._made: dict[bool, tuple[tuple[int, ...], Any]] = {}

    def _spread(self, weights: Weights, devices: DeviceMesh) -> nn.Module:
        """The weights of what is left of the model, each layer split and sharded as it comes."""
        mesh, config, names = self.mesh, weights.config, {name for name, _ in weights.model.named_parameters()}
        if mesh.inner > 1:
            quiet_redistribution()
            check_heads(config.num_attention_heads, mesh.inner)

        def part(layer: nn.Module) -> None:
            if self.tensors is not None:
                split_layer(layer, config, self.tensors)
            if mesh.data_size * mesh.inner > 1:
                fully_shard(layer, mesh=devices[_data_of(mesh)])

        model: Any = weights.of(names).fill(mesh.device, part)
        if self.tensors is not None:
            split_ends(model, self.tensors)
        return model

    def _schedule(self, micro: MicroBatch, count: int, *, backward: bool) -> Any:
        """For micro-batches of one shape. Buffers, and what is sent, are of that shape: another takes others."""
        shape = (*micro["input_ids"].shape, count)
        if self._made.get(backward, ((), None))[0] != shape:
            size = (*micro["input_ids"].shape, self.hidden)
            stream = torch.empty(size, dtype=self.dtype, device="meta", requires_grad=backward)
            stages = [
                PipelineStage(
                    stage,
                    self.mesh.stage + turn * self.mesh.pipeline,
                    self.count,
                    self.mesh.device,
                    input_args=() if stage.is_first else stream,
                    output_args=torch.empty(1, device="meta", requires_grad=backward) if stage.is_last else stream,
                    group=self.group,
                )
                for turn, stage in enumerate(self.stages)
            ]
            loss = self._scaled if backward else None
            self._made[backward] = shape, schedule_of(self.mesh, stages, count, loss)
        return self._made[backward][1]

    def _scaled(self, total: Tensor, target: Tensor) -> Tensor:
        return self.casts.scale(total.sum() * self.scale)

    def _run(self, here: Sequence[MicroBatch], objective: Objective, *, backward: bool) -> list[Loss]:
        """All micro-batches, that are on the device, through all stages. Their losses where the last one is."""
        rows = [filled(micro, self.mesh.inner) for micro in here]
        objective = objective if self.tensors is None else over_the_vocabulary(objective, self.tensors)
        for stage in self.stages:
            stage.begin(rows, here, objective)
        try:
            schedule = self._schedule(rows[0], len(here), backward=backward)
            schedule.step(target=torch.empty(len(here)), return_outputs=False)
        except RuntimeError as error:  # what a stage raised, told with the sizes of all it was given
            cause = error.__cause__
            if cause is None:
                raise
            if is_compiler_error(cause):  # the other stages would not begin the step again
                raise InputError(
                    'train.compile: compiling failed in a stage of the pipeline; set train.compile = "off" '
                    f"({type(cause).__name__}: {cause})"
                ) from cause
            raise cause from None
        return self.stages[-1].losses

    def forward_backward(self, micro_batches: Sequence[MicroBatch], count: int) -> Sums:
        mesh, sums = self.mesh, Sums(torch.zeros((), device=self.mesh.device, dtype=torch.float32))
        self.scale = mesh.averaged / max(1, count)
        here = [placed(micro, mesh.device) for micro in micro_batches]
        losses = self._run(here, self.objective, backward=True)
        if losses and mesh.rank % mesh.inner == 0:
            for loss, micro in zip(losses, here, strict=True):
                sums.add(loss, micro)
        if self.tied:
            self._join_ends()
        # The first stage speaks for its rows.
        dist.all_reduce(sums.total, group=self.group)
        sums.total *= mesh.speaks_for_its_rows
        return sums

    @torch.no_grad()
    def _join_ends(self) -> None:
        """The gradient of a tied weight: that of the embedding and that of the head, at both ends the same sum."""
        gradient = self.model.model.embed_tokens.weight.grad
        mine = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        theirs, other = torch.empty_like(mine), 0 if self.stages[-1].is_last else self.mesh.pipeline - 1
        moves = [
            dist.P2POp(move, tensor, group=self.group, group_peer=other)
            for move, tensor in ((dist.isend, mine), (dist.irecv, theirs))
        ]
        for work in dist.batch_isend_irecv(moves):
            work.wait()
        mine += theirs

    def gradient_norm(self, parameters: Sequence[Tensor]) -> Tensor:
        again = self.model.model.embed_tokens.weight if self.tied and self.stages[-1].is_last else None
        square = total_norm([parameter for parameter in parameters if parameter is not again]).square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    def evaluate(self, micro: MicroBatch, other: Objective | None = None) -> Loss:
        with torch.no_grad():
            losses = self._run([placed(micro, self.mesh.device)], other or self.objective, backward=False)
        found: list[Any] = [losses[0].on_host() if losses else None]
        dist.broadcast_object_list(found, group=self.group, group_src=self.mesh.pipeline - 1, device=self.mesh.device)
        told: Loss = found[0]
        return told


def schedule_of(mesh: Mesh, stages: Sequence[PipelineStage], count: int, loss: Any) -> Any:
    """The order that the mesh names, or, where so many micro-batches do not fit it, the one with all forward passes
    first.
    """
    known: dict[str, Any] = {"n_microbatches": count, "loss_fn": loss, "scale_grads": False}
    if len(stages) > 1:
        fits = count % max(1, count // mesh.pipeline) == 0
        return (ScheduleInterleaved1F1B if fits else ScheduleLoopedBFS)(list(stages), **known)
    one_by_one = mesh.schedule == "1f1b" and count >= mesh.pipeline
    return (Schedule1F1B if one_by_one and loss else ScheduleGPipe)(stages[0], **known)


def _data_of(mesh: Mesh) -> tuple[str, ...]:
    """The dimensions over which a stage's rows are dealt."""
    return ("replicate", "shard") if mesh.data_size > mesh.shard else ("shard",)


def pipeline(weights: Weights, mesh: Mesh, objective: Objective, casts: Casts) -> Parallelised:
    """Stages by cost; gradients are averaged over the ranks of a stage that read other rows, once a step."""
    made = Pipeline(weights, mesh, objective, casts)
    return Parallelised(
        made.model, made.model, made.forward_backward, made.gradient_norm, made.evaluate, forward="never"
    )


PIPELINE = Mode(check_mesh, pipeline)
