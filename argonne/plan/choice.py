"""How a step is best run on given devices: layout, micro-batch, activation checkpointing and loss, chosen by memory and then by speed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.plan.devices import Device, device, find_device, peak_of, resolve_precision
from argonne.plan.memory import LIBRARIES_CPU, Memory, Setup, memory_of
from argonne.plan.shape import ModelShape

# A GPU process cannot have all of its card: what the allocator cannot use for fragmentation.
USABLE = 0.95
# Tokens of a micro-batch at which a GPU reaches half of its speed, and at which `Device.expected_use` holds: the family's own throughput at
# micro-batches of 1, 2, 4 and 8 rows of 2,048 was 0.46, 0.72, 0.96 and 1 of the best (docs/plan.md).
HALF_SPEED_TOKENS, FULL_SPEED_TOKENS = 2048, 16384
# On a CPU larger micro-batches only leave the caches.
CPU_TOKENS = 4096
_GPU_COUNTS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)
_GPU_NAMES = ("rtx-4090", "a100-40gb", "a100-80gb", "h100", "h200", "b200")


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; their product is the number of devices."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1

    @property
    def data_parallel(self) -> int:
        return self.replicate * self.shard

    @property
    def speed(self) -> float:
        """Assumed share of the speed that communication leaves."""
        return (0.95 if self.shard > 1 else 1.0) * (0.85 if self.tensor > 1 else 1.0) * (0.9 if self.context * self.pipeline > 1 else 1.0)


@dataclass(frozen=True)
class Choice:
    """One way to run a step: what a device holds at its peak, and its speed relative to an unhindered one."""

    setup: Setup
    layout: Layout
    memory: Memory
    speed: float
    fits: bool


def usable_memory(known: Device, gpus: int) -> float:
    """Bytes a training process may use: of its card, or its share of this machine's memory on a CPU, where all processes are together."""
    if known.memory is not None:
        return USABLE * known.memory
    return USABLE * machine_memory() / gpus


def machine_memory() -> float:
    """Bytes this machine, or the container this process is in, can use."""
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups, version 2 and 1
        file = Path("/sys/fs/cgroup") / name
        text = file.read_text().strip() if file.is_file() else ""
        if text.isdigit():
            limits.append(float(text))
    return min(limits)


def best_choice(recipe: Recipe, shape: ModelShape, known: Device, gpus: int) -> Choice:
    """The fastest choice that fits; where none does, the one that needs least. Raises InputError for degrees that do not divide the devices."""
    limit = usable_memory(known, gpus)
    choices = [choice for layout in layouts(recipe, gpus) for choice in _choices(recipe, shape, known, layout, limit)]
    fitting = [choice for choice in choices if choice.fits]
    if fitting:
        return max(fitting, key=lambda choice: (choice.speed, -choice.memory.total))
    return min(choices, key=lambda choice: choice.memory.total)


def layouts(recipe: Recipe, gpus: int) -> Iterator[Layout]:
    """The recipe's degrees; where it leaves all of them open, every device a replica, or the state sharded over all."""
    asked = recipe.parallel
    fixed = asked.shard * asked.tensor * asked.context * asked.pipeline * max(1, asked.replicate)
    if gpus % fixed or (asked.replicate and gpus != fixed):
        raise InputError(
            f"[parallel]: replicate {asked.replicate or 'auto'}, shard {asked.shard}, tensor {asked.tensor}, context {asked.context}, pipeline "
            f"{asked.pipeline} do not make {gpus} devices; give --gpus a multiple of {fixed}, or other degrees"
        )
    yield Layout(asked.replicate or gpus // fixed, asked.shard, asked.tensor, asked.context, asked.pipeline)
    if fixed == 1 and asked.replicate == 0 and gpus > 1:
        yield Layout(shard=gpus)


def _choices(recipe: Recipe, shape: ModelShape, known: Device, layout: Layout, limit: float) -> Iterator[Choice]:
    """One choice for each way of checkpointing and of computing the loss that the recipe leaves open, each with its largest micro-batch."""
    train, cpu = recipe.train, known.name == "cpu"
    ways = [("none", 2), ("every_nth", train.checkpointing_stride), ("full", 1)]
    asked = train.activation_checkpointing
    if asked != "auto":
        ways = [(asked, train.checkpointing_stride)]
    for checkpointing, stride in ways:
        for loss in ("full", "chunked") if train.loss == "auto" else (train.loss,):
            setup = Setup(
                rows=1,
                sequence_length=recipe.data.sequence_length,
                precision=resolve_precision(train.precision, known.name, has_bf16=known.bf16 is not None or known.fp16 is None),
                activation_checkpointing=checkpointing,
                checkpointing_stride=stride,
                loss=loss,
                loss_chunk=train.loss_chunk,
                optimizer=recipe.optim.name,
                muon_width=2 if recipe.optim.muon_dtype == "bfloat16" else 4,
                cpu=cpu,
                shard=layout.shard,
                tensor=layout.tensor,
                context=layout.context,
                pipeline=layout.pipeline,
            )
            setup = _with_micro_rows(recipe, shape, setup, layout, limit)
            memory = _with_libraries(memory_of(shape, setup), cpu)
            recomputed = setup.share_recomputed(shape.num_hidden_layers)
            speed = _micro_speed(setup) * 3 / (3 + recomputed) * layout.speed
            yield Choice(setup, layout, memory, speed, memory.total <= limit)


def _with_libraries(memory: Memory, cpu: bool) -> Memory:
    """On a CPU the libraries share the memory with the tensors, and a run's peak memory counts both."""
    return Memory({**memory.parts, "libraries": LIBRARIES_CPU}, memory.moment) if cpu else memory


def _micro_speed(setup: Setup) -> float:
    if setup.cpu:
        return 1.0
    tokens = setup.rows * setup.sequence_length
    best = FULL_SPEED_TOKENS / (FULL_SPEED_TOKENS + HALF_SPEED_TOKENS)
    return min(1.0, tokens / (tokens + HALF_SPEED_TOKENS) / best)


def running_device(name: str, memory: float | None) -> Device:
    """The device a run is on: as its driver names it ("cpu" for a CPU), with `memory` bytes in all where they are known."""
    known = find_device(name) or Device(name, memory, None, None, None)
    return known if memory is None or known.name == "cpu" else replace(known, memory=memory)


def _with_micro_rows(recipe: Recipe, shape: ModelShape, setup: Setup, layout: Layout, limit: float) -> Setup:
    """The recipe's micro-batch, or the largest that fits, evened out over the micro-batches of a step."""
    share = math.ceil(recipe.batch.tokens_per_step / recipe.data.sequence_length / layout.data_parallel)

    def with_rows(rows: int) -> Setup:
        return replace(setup, rows=rows, accumulates=rows < share)

    if isinstance(recipe.batch.micro, int):
        return with_rows(min(recipe.batch.micro, share))
    if setup.cpu:
        return with_rows(max(1, min(share, CPU_TOKENS // setup.sequence_length)))
    low, high = 1, share
    while low < high:
        middle = (low + high + 1) // 2
        if memory_of(shape, with_rows(middle)).total <= limit:
            low = middle
        else:
            high = middle - 1
    return with_rows(math.ceil(share / math.ceil(share / low)))


def expected_rate(choice: Choice, known: Device, gpus: int, flops_per_token: float) -> tuple[float | None, float | None]:
    """(assumed MFU, tokens a second over all devices). MFU is None where a sustained rate is assumed instead, both where nothing is known."""
    peak = peak_of(known, choice.setup.precision)
    if peak is None:
        return None, gpus * known.sustained * choice.speed / flops_per_token if known.sustained else None
    mfu = known.expected_use * choice.speed
    return mfu, gpus * mfu * peak / flops_per_token


def what_would_fit(recipe: Recipe, shape: ModelShape, known: Device, gpus: int) -> str:
    """The smallest number of these devices, and the smallest other device in this number, that could hold the run."""
    found = []
    more = next((count for count in _GPU_COUNTS if count > gpus and _fits(recipe, shape, known, count)), None)
    if more is not None:
        layout = best_choice(recipe, shape, known, more).layout
        how = f", --parallel.shard {more}" if layout.shard > 1 else ""
        found.append(f"{more} x {known.name} (--gpus {more}{how})")
    bigger = next((name for name in _GPU_NAMES if _larger(name, known) and _fits(recipe, shape, device(name), gpus)), None)
    if bigger is not None:
        found.append(f"{gpus} x {bigger}")
    if recipe.train.precision != "bf16_full" and known.bf16:
        narrow = replace(recipe, train=replace(recipe.train, precision="bf16_full"))
        if _fits(narrow, shape, known, gpus):
            found.append(f"{gpus} x {known.name} with weights and moments in bf16 (--train.precision bf16_full)")
    return "would fit on " + " or ".join(found) if found else "fits on no layout that this plan knows; use a smaller model or shorter rows"


def _larger(name: str, known: Device) -> bool:
    return (device(name).memory or 0) > (known.memory or machine_memory())


def _fits(recipe: Recipe, shape: ModelShape, known: Device, gpus: int) -> bool:
    try:
        return best_choice(recipe, shape, known, gpus).fits
    except InputError:
        return False
