"""Faults as they have been made, here and elsewhere, each planted in the product's own code while the block runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import SequenceParallel

from argonne.model import attention, loss
from argonne.parallel import context, parallelise, pipeline, shard, tensor
from argonne.parallel.mesh import Mesh
from argonne.train import muon

LOCAL_COUNT = "the loss is divided by the rank's own count"
LOCAL_NORM = "the norm is of the rank's own parts"
ROOT_ONLY = "the gradient divide factor is set on the root alone"
TIED_TWICE = "the norm counts the tied head twice"
DEFAULT_GROUP = "Muon deals its work over torch's default group"
OF_PARTS = "Muon takes a rank's part of a matrix for the whole"
NO_ALL_REDUCE = "copies of the model are never put together"
WINDOW_EDGE = "a window is one key too short at the edge of a part"
DOCUMENT_EDGE = "a document ends at the edge of a part"
RESTARTED = "positions restart in each part"
OWN_KEYS_ONLY = "what other ranks make of keys and values is dropped"
MEAN_OF_PARTS = "gradients of the parts of a row are averaged"
OWN_ROWS = "a row is summed over the rank's own part"
OWN_INPUTS = "what enters q, k, v, gate and up, and with it every norm, gets its own rank's gradients alone"
OWN_TOKENS = "gains of norms get the gradients of their own rank's tokens alone"
ORDER_OF_PARTS = "attention gathers the parts of the text in the wrong order"
OWN_GAINS = "gains of q, k and v get the gradients of their own rank's heads alone"
OWN_KEYS = "a head of keys that several ranks read gets the gradients of one"
TIED_APART = "each end of a pipeline keeps its own gradient of the tied head"
OWN_STAGE = "the norm is of the rank's own stage"
MEAN_OF_MICRO = "gradients of micro-batches are averaged, as torch does by itself"
OTHER_MICRO = "a stage takes the documents of another micro-batch"
OWN_VOCABULARY = "what enters a split head gets the gradients of its own rows of the vocabulary"


@contextmanager
def planted(name: str) -> Iterator[None]:
    if not name:
        yield
        return
    with ExitStack() as faults:
        for target, attribute, fault in FAULTS[name]:
            faults.enter_context(mock.patch.object(target, attribute, fault))
        yield


def _divide_by_own(original: Callable[..., Any]) -> Callable[..., Any]:
    def in_one_call(stepped: nn.Module, plain: nn.Module, mesh: Any, *rest: Any, **more: Any) -> Any:
        made = original(stepped, plain, mesh, *rest, **more)

        def forward_backward(micro_batches: Sequence[Any], count: int) -> Any:
            parts = [micro["shift_labels"].tensor_split(mesh.context, dim=1)[mesh.part] for micro in micro_batches]
            own = sum(int((labels >= 0).sum()) for labels in parts)
            return made.forward_backward(micro_batches, own * mesh.averaged)

        return parallelise.Parallelised(
            stepped, plain, forward_backward, made.gradient_norm, made.evaluate, made.forward
        )

    return in_one_call


def _own_norm(parameters: Sequence[Tensor]) -> Tensor:
    parts = [parameter.grad for parameter in parameters if parameter.grad is not None]
    own = [part.to_local() if isinstance(part, DTensor) else part for part in parts]
    return torch.nn.utils.get_total_norm(own)


def _twice(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def total_norm(parameters: Sequence[Tensor]) -> Tensor:
        table = max(parameters, key=lambda parameter: parameter.numel())
        return original([*parameters, table])

    return total_norm


def _undivided(module: Any, **how: Any) -> FSDPModule:
    sharded = fully_shard(module, **how)
    if hasattr(module, "lm_head"):
        sharded.set_gradient_divide_factor(1.0)
    return sharded


def _without_all_reduce(module: Any, **how: Any) -> FSDPModule:
    sharded = fully_shard(module, **how)
    sharded.set_requires_all_reduce = lambda wanted: None  # type: ignore[method-assign,assignment]
    FSDPModule.set_requires_all_reduce(sharded, False)
    return sharded


def _dealt_by_global_rank(self: Any, directions: list[Tensor], size: int, group: Any) -> list[Tensor]:
    with mock.patch.object(dist, "get_rank", return_value=int(os.environ["RANK"])):
        return SPREAD(self, directions, size, group)


def _of_parts(self: Any, directions: list[Tensor]) -> list[Tensor]:
    parts = [one.to_local() if isinstance(one, DTensor) else one for one in directions]
    found = [muon.orthogonalise(part, self._dtype) for part in parts]
    return [
        DTensor.from_local(part, one.device_mesh, one.placements, shape=one.shape, stride=one.stride())
        if isinstance(one, DTensor)
        else part
        for part, one in zip(found, directions, strict=True)
    ]


def _short_at_edge(part: Any, window: int | None, hidden: Tensor) -> Any:
    found = PATTERN_OF_PART(part, window, hidden)
    if window is not None and part.first >= window and found.dense is not None:
        found.dense[:, :, 0, 0] = False
    return found


def _ending_at_edge(part: Any, window: int | None, hidden: Tensor) -> Any:
    found = PATTERN_OF_PART(part, window, hidden)
    if found.dense is not None:
        found.dense[..., : -hidden.shape[1]] = False
    return found


def _restarted(mesh: Mesh, model: nn.Module, micro: Any, objective: Any) -> Any:
    def restarting(position_ids: Tensor, **given: Any) -> Any:
        return model(position_ids=(position_ids - position_ids[:, :1]).clamp_min(0), **given)

    return LOSS_OF_PART(mesh, restarting, micro, objective)  # type: ignore[arg-type]


class _KeepsOwn(context._Gather):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(dist.get_world_size(ctx.group), dim=3)[dist.get_rank(ctx.group)], None


def _own_part(self: context.Part, part: Tensor) -> Tensor:
    parts = [torch.zeros_like(part) for _ in range(self.mesh.context)]
    parts[self.mesh.part] = part
    return torch.cat(parts, dim=-1)


PATTERN_OF_PART, LOSS_OF_PART = attention.pattern_of_part, context.loss_of_part


def _own_inputs(stream: DTensor) -> Tensor:
    return stream.redistribute(placements=[Replicate()]).to_local()


def _swapped(stream: DTensor) -> Tensor:
    whole = WHOLE(stream)
    return whole.roll(whole.shape[1] // stream.device_mesh.size(), 1)


def _own_gains(dimension: int) -> Callable[..., SequenceParallel]:
    """Norms of what is split over this dimension take their input for whole, and with it the gradient of a gain."""

    class OwnGains(SequenceParallel):
        @staticmethod
        def _prepare_input_fn(split: Any, module: nn.Module, inputs: Any, mesh: Any) -> DTensor:
            first = inputs[0]
            return DTensor.from_local(first.to_local() if isinstance(first, DTensor) else first, mesh, [Replicate()])

        @staticmethod
        def _prepare_output_fn(local: bool, module: nn.Module, output: DTensor, mesh: Any) -> Tensor:
            return output.to_local() if local else DTensor.from_local(output.to_local(), mesh, [Shard(dimension)])

    def style(sequence_dim: int = 1, **how: Any) -> SequenceParallel:
        return (OwnGains if sequence_dim == dimension else SequenceParallel)(sequence_dim=sequence_dim, **how)

    return style


def _own_keys(self: Any, module: nn.Module, output: DTensor, mesh: Any) -> Tensor:
    return output.to_local().index_select(-1, self.columns)


def _by_own_count(self: pipeline.Pipeline, micro_batches: Sequence[Any], count: int) -> Any:
    own = sum(int((micro["shift_labels"] >= 0).sum()) for micro in micro_batches)
    return FORWARD_BACKWARD(self, micro_batches, own * self.mesh.averaged)


def _both_ends(self: pipeline.Pipeline, parameters: Sequence[Tensor]) -> Tensor:
    with mock.patch.object(self, "tied", new=False):
        return GRADIENT_NORM(self, parameters)


def _of_stage(self: pipeline.Pipeline, parameters: Sequence[Tensor]) -> Tensor:
    with mock.patch.object(pipeline.dist, "all_reduce"):
        return GRADIENT_NORM(self, parameters)


def _averaging(stages: Any, **how: Any) -> Any:
    return ONE_BY_ONE(stages, **{**how, "scale_grads": True})


def _of_others(self: pipeline.Stage, rows: Sequence[Any], micro_batches: Sequence[Any], objective: Any) -> None:
    BEGIN(self, rows[::-1] if self.is_last else rows, micro_batches, objective)


FORWARD_BACKWARD, GRADIENT_NORM = pipeline.Pipeline.forward_backward, pipeline.Pipeline.gradient_norm
ONE_BY_ONE, BEGIN = pipeline.Schedule1F1B, pipeline.Stage.begin


def _own_vocabulary(original: Callable[..., Any]) -> Callable[..., Any]:
    def summed(tensor: Tensor, *rest: Any, **how: Any) -> Any:
        is_of_hidden = tensor.ndim == 2 and tensor.shape[1] > 1
        return None if is_of_hidden else original(tensor, *rest, **how)

    return summed


SPREAD, WHOLE = muon.MuonAdamW._spread, tensor.Gathered.whole
FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    LOCAL_COUNT: [
        *((page, "in_one_call", _divide_by_own(parallelise.in_one_call)) for page in (parallelise, shard, tensor)),
        (pipeline.Pipeline, "forward_backward", _by_own_count),
    ],
    LOCAL_NORM: [(page, "total_norm", _own_norm) for page in (parallelise, pipeline)],
    ROOT_ONLY: [(shard, "fully_shard", _undivided)],
    TIED_TWICE: [
        (parallelise, "total_norm", _twice(parallelise.total_norm)),
        (pipeline.Pipeline, "gradient_norm", _both_ends),
    ],
    TIED_APART: [(pipeline.Pipeline, "_join_ends", lambda self: None)],
    OWN_STAGE: [(pipeline.Pipeline, "gradient_norm", _of_stage)],
    MEAN_OF_MICRO: [(pipeline, "Schedule1F1B", _averaging)],
    OTHER_MICRO: [(pipeline.Stage, "begin", _of_others)],
    DEFAULT_GROUP: [(muon.MuonAdamW, "_spread", _dealt_by_global_rank)],
    OF_PARTS: [(muon.MuonAdamW, "_orthogonal", _of_parts)],
    WINDOW_EDGE: [(attention, "pattern_of_part", _short_at_edge)],
    DOCUMENT_EDGE: [(attention, "pattern_of_part", _ending_at_edge)],
    RESTARTED: [(context, "loss_of_part", _restarted)],
    OWN_KEYS_ONLY: [(context, "_Gather", _KeepsOwn)],
    MEAN_OF_PARTS: [(Mesh, "averaged", Mesh.data_size)],
    OWN_ROWS: [(context.Part, "join", _own_part)],
    NO_ALL_REDUCE: [
        *((page, "fully_shard", _without_all_reduce) for page in (shard, tensor)),
        (pipeline, "_data_of", lambda mesh: ("shard",)),
    ],
    OWN_INPUTS: [(tensor.Gathered, "whole", staticmethod(_own_inputs))],
    OWN_GAINS: [(tensor, "SequenceParallel", _own_gains(2))],
    OWN_TOKENS: [(tensor, "SequenceParallel", _own_gains(1))],
    ORDER_OF_PARTS: [(tensor.Gathered, "whole", staticmethod(_swapped))],
    OWN_KEYS: [(tensor.OwnHeads, "_leave", _own_keys)],
    OWN_VOCABULARY: [(loss.dist, "all_reduce", _own_vocabulary(dist.all_reduce))],
}
