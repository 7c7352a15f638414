"""Each rank of a group holds a part of every tensor and gathers a layer when it runs: torch's FSDP2. Several groups are
copies of one another (HSDP).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from argonne.keys import check_mesh
from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import Objective
from argonne.parallel.parallelise import Casts, Mode, Parallelised, Pass, Weights, in_one_call, loss_of


def shard(
    weights: Weights, mesh: Mesh, objective: Objective, casts: Casts, forward_pass: Pass = loss_of
) -> Parallelised:
    """Layer by layer as the weights come, so that no rank ever holds more whole tensors than one layer's and those
    outside of layers. Gradients are averaged over all ranks. Ranks that read parts of the same rows share a copy too.
    """
    parts = mesh.shard * mesh.context
    copies = mesh.world_size // parts
    sizes = (parts,) if copies == 1 else (copies, parts)
    # The ranks of a group stand side by side, on one node where they fit.
    devices = init_device_mesh(mesh.device.type, sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    part = partial(fully_shard, mesh=devices)
    model = weights.fill(mesh.device, part)
    whole = part(model)

    @contextmanager
    def sync(wanted: bool) -> Iterator[None]:
        # Within a group every backward pass sums the parts: whole gradients would take a copy of the model. Groups are
        # put together once a step.
        whole.set_requires_all_reduce(wanted)
        yield

    return in_one_call(model, model, mesh, objective, casts, sync=sync, forward="together", forward_pass=forward_pass)


SHARDED = Mode(check_mesh, shard)
