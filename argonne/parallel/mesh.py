"""The processes of one run and what they agree on. A single process is a mesh of size one: the trainer has no second
code path.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from argonne.errors import InputError

if TYPE_CHECKING:
    from argonne.config import ParallelSection


# Collectives wait this many times longer than a step may take.
PATIENCE = 6


@dataclass(frozen=True)
class Mesh:
    """This process's place among the workers.

    The ranks of a pipeline, of tensor and of context parallelism read the same rows: `data_rank` of `data_size` is the
    place in the data, and the first rank of each place speaks for it where counts are added. Pipeline is the outermost
    dimension, then copies of the model, then the `shard` ranks that share one, tensor and context the innermost.

    Groups: `agreement` (gloo) for decisions such as stop, save and counts, `saving` (gloo) for saves in the background,
    `data` for the ranks that hold the same part of the model and differ in their data, `rows` for those that hold the
    tokens of the same rows between them; None is torch's default group, on which gradients travel.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    agreement: Any = None
    saving: Any = None
    data: Any = None
    rows: Any = None
    pipeline: int = 1
    inner: int = 1
    shard: int = 1
    context: int = 1
    schedule: str = "1f1b"
    stages: int = 1

    @property
    def stage(self) -> int:
        """The place in the pipeline."""
        return self.rank // (self.world_size // self.pipeline)

    @property
    def data_size(self) -> int:
        """Parts in which the rows of a global batch are dealt."""
        return self.world_size // (self.pipeline * self.inner)

    @property
    def data_rank(self) -> int:
        return self.rank % (self.world_size // self.pipeline) // self.inner

    @property
    def part(self) -> int:
        """Which part of its rows' tokens this rank holds."""
        return self.rank % self.context

    @property
    def averaged(self) -> int:
        """Ranks over which the reduction of gradients takes the mean."""
        return self.data_size * self.context

    @property
    def speaks_for_its_rows(self) -> bool:
        """Is this the first of the ranks that read the same rows?"""
        return self.rank == self.data_rank * self.inner

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_later(self, values: list[int]) -> Callable[[], list[int]]:
        """Start adding whole numbers over all ranks; the returned function waits and gives the sums. Nothing touches
        the device.
        """
        if self.world_size == 1:
            return lambda: values
        tensor = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.agreement, async_op=True)

        def wait() -> list[int]:
            work.wait()
            return [int(value) for value in tensor.tolist()]

        return wait

    def largest(self, value: int) -> int:
        """The largest value over all ranks (a flag any rank raised, the worst exit code)."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.agreement)
        return int(tensor.item())

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.agreement)
        return box[0]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        """Fill a CPU tensor with rank 0's."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0, group=self.agreement)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value in order of rank, on every rank."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self.agreement)
        return box

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.agreement)


def _data_groups(mesh: Mesh) -> list[list[int]]:
    """Ranks that hold the same part of the model, one list a part."""
    width = mesh.world_size // mesh.pipeline
    return [
        list(range(stage * width + part, (stage + 1) * width, mesh.inner))
        for stage in range(mesh.pipeline)
        for part in range(mesh.inner)
    ]


def worker_count(parallel: ParallelSection, device: str, nodes: int = 1) -> int:
    """Workers to start here, on one of so many nodes: what the recipe says, else one a GPU, else as many as its degrees
    need. Under torchrun or
    srun this process is a worker already: 1.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return 1
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if parallel.nproc > 1 and gpus and parallel.nproc > gpus:
        raise InputError(f"parallel.nproc: found {parallel.nproc}, expected at most {gpus}, the GPUs of this machine")
    asked = (parallel.replicate, parallel.shard, parallel.tensor, parallel.context, parallel.pipeline)
    return parallel.nproc or gpus or max(1, math.prod(degree or 1 for degree in asked) // nodes)


@contextmanager
def open_mesh(parallel: ParallelSection, device_name: str, *, timeout_seconds: float = 600.0) -> Iterator[Mesh]:
    """Join the workers that torchrun, srun or argonne's own launcher started; alone, a mesh of one without any process
    group.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    pipeline, inner = parallel.pipeline, parallel.tensor * parallel.context
    if world_size % (pipeline * inner * parallel.shard):
        raise InputError(
            f"parallel: {world_size} workers were started, expected a multiple of pipeline x tensor x context x shard "
            f"= {pipeline * inner * parallel.shard}"
        )
    replicas = world_size // (pipeline * inner * parallel.shard)
    if parallel.replicate not in (0, replicas):
        raise InputError(
            f"parallel.replicate: found {parallel.replicate}, expected {replicas}, the number of workers started"
        )
    device = choose_device(device_name, local_rank, where="train.device")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Mesh(device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    # A hung step is found by its own watch; the groups also wait while rank 0 saves, evaluates or exports, which may
    # take far longer.
    timeout = timedelta(seconds=PATIENCE * timeout_seconds)
    # Restarted workers meet in a store that still holds the addresses of the dead ones: each attempt gets keys of its
    # own.
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        agreement = dist.new_group(backend="gloo", timeout=timeout)
        saving = dist.new_group(backend="gloo", timeout=timeout)
        place = Mesh(
            *(device, rank, world_size, local_rank, agreement, saving),
            pipeline=pipeline,
            inner=inner,
            shard=parallel.shard,
            context=parallel.context,
            schedule=parallel.schedule,
            stages=parallel.stages if parallel.schedule == "interleaved" else 1,
        )
        named = ("shard", "tensor", "context", "pipeline", "schedule", "stages")
        said = place.gather(", ".join(f"{name} {getattr(parallel, name)}" for name in named))
        if len(found := dict.fromkeys(said)) > 1:  # of other nodes: groups would wait for one another
            raise InputError(
                f"[parallel]: workers were started with {' and with '.join(found)}; give every node the same command, "
                'and numbers where "auto" comes to others'
            )
        data = rows = None
        if place.data_size < world_size:
            data, _ = dist.new_subgroups_by_enumeration(_data_groups(place), backend=backend, timeout=timeout)
        if parallel.context > 1:
            rows, _ = dist.new_subgroups(parallel.context, backend=backend, timeout=timeout)
        yield replace(place, data=data, rows=rows)
    finally:
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int = 0, *, where: str = "device") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; `cuda` without a number is card `local_rank`.

    where: the key or flag that gave the name. Raises InputError for a device that is not known, or not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdigit()):
        raise InputError(f"{where}: found {name!r}, expected auto, cpu, cuda or mps")
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    index = int(number) if number else local_rank if kind == "cuda" else 0
    if index >= here:
        asked = f"{kind}:{index}" if index else name
        raise InputError(f"{where}: found {asked!r}, but torch sees {here} such devices here; use auto or cpu")
    return torch.device(kind, index) if kind == "cuda" else torch.device(kind)
