"""Each rank of a group holds some heads, some columns of the MLP and some rows of the vocabulary, and works on the
same rows of text: torch's DTensor. Over groups FSDP2 shards, or copies, what they hold.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from argonne.keys import check_heads, check_mesh
from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import Head, Loss, MicroBatch, Objective
from argonne.parallel.parallelise import Casts, Mode, Parallelised, Pass, Weights, in_one_call, loss_of

TEXT = Shard(1)  # of the stream (B, T, H)
# What leaves the last norm is plain and whole.
WHOLE = PrepareModuleOutput(output_layouts=TEXT, desired_output_layouts=Replicate())


def parted(hidden: Tensor, mesh: DeviceMesh) -> DTensor:
    """The stream of a whole (B, T, H), the same on every rank of the group."""
    return DTensor.from_local(hidden, mesh, [Replicate()]).redistribute(placements=[TEXT])


def whole(stream: Tensor) -> Tensor:
    """Back from it: no view, which FSDP2 warns of."""
    return cast(DTensor, stream).redistribute(placements=[Replicate()]).to_local().clone()


class Gathered(ParallelStyle):
    """The whole text enters, a plain tensor, for all that read it: their gradients are added before they are sent. As a
    DTensor it would get a wrong gradient where a compiled layer has to be cut (2.13; seen in tests/parity).
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(lambda _, inputs: (self.whole(inputs[0]), *inputs[1:]))
        return module

    @staticmethod
    def whole(stream: DTensor) -> Tensor:
        return stream.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def entered(module: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> DTensor:
    """What was gathered, for a matrix."""
    return DTensor.from_local(inputs[0], mesh, [Replicate()], grad_placements=[Partial()])


class Columns(ColwiseParallel):
    """Columns of a matrix that reads what was gathered."""

    @staticmethod
    def _prepare_input_fn(layouts: Any, desired: Any, module: Any, inputs: Any, mesh: Any) -> DTensor:
        return entered(module, inputs, mesh)


class OwnHeads(ParallelStyle):
    """Every rank makes all heads of keys or values, and goes on with those that its queries read: for fewer of them
    than ranks. A head that several ranks read gets the gradients of all of them.
    """

    def __init__(self, heads: Sequence[int], head_dim: int) -> None:
        self.columns = torch.tensor([head * head_dim + place for head in heads for place in range(head_dim)])

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        hooks: Any = entered, self._leave  # torch's own types say that they return nothing
        return distribute_module(module, device_mesh, None, *hooks)

    def _leave(self, module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        whole = output.to_local(grad_placements=[Partial()])
        return whole.index_select(-1, self.columns.to(whole.device))


class Rows(RowwiseParallel):
    """Rows of a matrix, or of a table: what leaves is split along the text, and there. Torch's own hands on what is
    still on its way, of which a compiled layer returns a wrong gradient (2.13; seen in tests/parity).
    """

    @staticmethod
    def _prepare_output_fn(output_layouts: Any, use_local_output: bool, module: Any, output: Any, mesh: Any) -> DTensor:
        found: DTensor = output.redistribute(placements=[TEXT])
        return found


class OwnMasks(ParallelStyle):
    """Dropout of a rank's own tokens by its own seed: torch's for a DTensor takes rank 0's."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        dropout: Any = module

        def drop(stream: DTensor) -> DTensor:
            own = F.dropout(stream.to_local(), dropout.p, dropout.training)
            return DTensor.from_local(own, device_mesh, stream.placements, shape=stream.shape, stride=stream.stride())

        dropout.forward = drop
        return module


def own_heads(queries: int, keys: int, degree: int, rank: int) -> list[int]:
    """The heads of keys that a rank's queries read: each once where its queries share them evenly and in order, else
    one for each query.
    """
    share, group = queries // degree, queries // keys
    read = [query // group for query in range(rank * share, (rank + 1) * share)]
    once = sorted(set(read))
    each, left = divmod(share, len(once))
    return once if not left and read == [head for head in once for _ in range(each)] else read


def split_layer(layer: nn.Module, config: Any, mesh: DeviceMesh) -> None:
    """A decoder layer over a group: columns of q, k, v, gate and up, rows of o and down. The stream enters and leaves
    split along the text (a DTensor, whose shape is the whole's); a plain one that enters is whole.
    """
    degree, rank = mesh.size(), mesh.get_local_rank()
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    attention: Any = layer.get_submodule("self_attn")
    of_keys: ParallelStyle = Columns()
    if keys % degree:
        heads = own_heads(queries, keys, degree, rank)
        of_keys = OwnHeads(heads, config.head_dim)
        attention.num_key_value_groups = queries // degree // len(heads)
    column = Columns(use_local_output=False)  # whose number may not divide
    plan: dict[str, ParallelStyle] = {
        "": PrepareModuleInput(input_layouts=(Replicate(), None), desired_input_layouts=(TEXT, None)),
        "self_attn": Gathered(),
        "self_attn.q_proj": Columns(),
        "self_attn.k_proj": of_keys,
        "self_attn.v_proj": of_keys,
        "self_attn.o_proj": Rows(),
        "mlp": Gathered(),
        "mlp.up_proj": column,
        "mlp.down_proj": Rows(),
        "dropout": OwnMasks(),
    }
    if config.mlp_gated:
        plan["mlp.gate_proj"] = column
    # A gain of heads sees each rank's own: its gradient is their sum.
    wanted = {"q_norm": config.q_norm, "k_norm": config.k_norm, "v_norm": config.v_norm}
    of_heads = SequenceParallel(sequence_dim=2, use_local_output=True)
    plan |= {f"self_attn.{name}": of_heads for name, there in wanted.items() if there}
    plan |= {name: SequenceParallel() for name, _ in layer.named_children() if name.endswith("layernorm")}
    parallelize_module(layer, mesh, plan, src_data_rank=None)


def split_ends(model: Any, mesh: DeviceMesh) -> None:
    """Embedding and head, those that are here, over rows of the vocabulary; tied ones stay one tensor."""
    places = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=TEXT)
    plan: dict[str, list[ParallelStyle]] = {
        "model.embed_tokens": [Rows(input_layouts=Replicate())],
        "model.embed_positions": [places, SequenceParallel()],
        "model.dropout": [OwnMasks()],
        "model.norm": [SequenceParallel(), WHOLE],
        "lm_head": [ColwiseParallel(output_layouts=Replicate())],
    }
    here = {name: part for name, part in model.named_modules() if not isinstance(part, nn.Identity)}
    for name in [name for name in plan if name in here]:
        for style in plan[name]:
            parallelize_module(here[name], mesh, style, src_data_rank=None)
    if model.config.tie_word_embeddings and {"model.embed_tokens", "lm_head"} <= here.keys():
        model.lm_head.weight = model.model.embed_tokens.weight


def filled(micro: MicroBatch, degree: int) -> MicroBatch:
    """Rows filled up to a length that the degree divides, with what no token sees: of two lengths whose parts are alike
    on some ranks alone, torch 2.13 takes a layer compiled for one as compiled for the other.
    """
    length = micro["input_ids"].shape[1]
    if not (missing := -length % degree):
        return micro
    given = {"input_ids": micro["input_ids"], "position_ids": micro.get("position_ids", torch.arange(length)[None])}
    return {name: F.pad(tensor, (0, missing)) for name, tensor in given.items()}


def loss_of_filled(degree: int) -> Pass:
    """What fills up is seen by no objective."""

    def loss_of_rows(model: nn.Module, micro: MicroBatch, objective: Objective) -> Loss:
        length = micro["input_ids"].shape[1]
        rows = filled(micro, degree)
        return loss_of(model, rows, lambda head, hidden, _: objective(head, hidden[:, :length], micro))

    return loss_of_rows


def over_the_vocabulary(objective: Objective, mesh: DeviceMesh) -> Objective:
    """The objective with a head that knows its own rows of the vocabulary, and whom to ask for the others."""

    def of_part(head: Head, hidden: Tensor, micro: MicroBatch) -> Loss:
        weight = cast(DTensor, head.weight)
        size = -(-weight.shape[0] // mesh.size())
        part = head.of_part(weight.to_local(), mesh.get_local_rank() * size, mesh.get_group())
        return objective(part, hidden, micro)

    return of_part


def quiet_redistribution() -> None:
    """Torch tells on every rank that a norm is reduced, and a matrix gathered, over one dimension after the other."""
    logging.getLogger(torch.distributed.tensor._redistribute.__name__).setLevel(logging.ERROR)


def split(weights: Weights, mesh: Mesh, objective: Objective, casts: Casts) -> Parallelised:
    """Layer by layer as the weights come. Gradients are averaged over the groups, whose ranks read the same rows."""
    sizes = (mesh.world_size // (mesh.shard * mesh.inner), mesh.shard, mesh.inner)
    dimensions = ("replicate", "shard", "tensor")
    used = dimensions if sizes[0] > 1 else dimensions[1:]
    devices = init_device_mesh(mesh.device.type, sizes[-len(used) :], mesh_dim_names=used)
    group, groups = devices["tensor"], devices[used[:-1]]
    quiet_redistribution()
    config = weights.config
    check_heads(config.num_attention_heads, mesh.inner)

    def part(layer: nn.Module) -> None:
        split_layer(layer, config, group)
        fully_shard(layer, mesh=groups)

    model = weights.fill(mesh.device, part)
    split_ends(model, group)
    whole = fully_shard(model, mesh=groups)

    @contextmanager
    def sync(wanted: bool) -> Iterator[None]:
        whole.set_requires_all_reduce(wanted)  # as in shard.py
        yield

    made = in_one_call(
        model,
        model,
        mesh,
        over_the_vocabulary(objective, group),
        casts,
        sync=sync,
        forward="together",
        forward_pass=loss_of_filled(mesh.inner),
    )

    def evaluate(micro: MicroBatch, other: Objective | None = None) -> Loss:
        return made.evaluate(micro, over_the_vocabulary(other or objective, group))

    return replace(made, evaluate=evaluate)


TENSOR = Mode(check_mesh, split)
