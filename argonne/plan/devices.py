"""Devices by name: memory, and the dense peak of their matrix units. What a plan and the trainer's MFU divide by."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.plan.memory import LIBRARIES_CPU, Memory, Setup, memory_of
from argonne.plan.mesh import NODE, Layout, Sent, layouts, sending_seconds, traffic_of
from argonne.plan.processor import multiplies_bf16
from argonne.plan.shape import ModelShape
from argonne.plan.stages import idle_share

GIB = 1024**3
TERA = 1e12


@dataclass(frozen=True)
class Device:
    """One accelerator, or a CPU.

    `bf16`, `fp16`, `tf32`: dense peak in FLOP/s with fp32 accumulation, no sparsity; None where there is no such unit.
    `memory`: bytes a process can allocate. `matches`: words that all occur in what the driver calls it. `expected_use`:
    the share of the peak that a plan assumes for this trainer and a large model, an assumption and printed as one.
    `sustained`: FLOP/s assumed where no peak is known. `node`: devices of a node.
    """

    name: str
    memory: float | None
    bf16: float | None
    fp16: float | None
    tf32: float | None
    matches: tuple[str, ...] = ()
    expected_use: float = 0.4
    sustained: float | None = None
    node: int = NODE


def _gpu(
    name: str,
    gib: float,
    bf16: float | None,
    tf32: float | None,
    *matches: str,
    fp16: float | None = None,
    use: float = 0.4,
) -> Device:
    half = fp16 if fp16 is not None else bf16
    return Device(name, gib * GIB, bf16 and bf16 * TERA, half and half * TERA, tf32 and tf32 * TERA, matches, use)


# NVIDIA's data sheets give the peak with sparsity for Hopper, Ada and Blackwell: these are half of it. Memory is what
# the driver reports as total, a little under the name. More specific names stand before less specific ones: the first
# match counts.
_DEVICES = (
    _gpu("b200", 178, 2250, 1125, "b200"),  # HGX B200 data sheet, per GPU: 4,500 bf16 sparse
    _gpu("gh200", 94.5, 989.4, 494.7, "gh200"),  # GH200 data sheet, 96 GB part: 1,979 bf16 sparse
    # H200 SXM data sheet: 1,979 bf16 sparse; 143,771 MiB less what the driver keeps
    _gpu("h200", 139.8, 989.4, 494.7, "h200"),
    _gpu("h100-nvl", 93.1, 835.5, 417.5, "h100", "nvl"),  # H100 NVL data sheet: 1,671 bf16 sparse
    _gpu("h100-pcie", 79.2, 756.5, 378, "h100", "pcie"),  # H100 PCIe data sheet: 1,513 bf16 sparse
    _gpu("h100", 79.2, 989.4, 494.7, "h100"),  # H100 SXM data sheet: 1,979 bf16 sparse
    _gpu("a100-80gb", 79.2, 312, 156, "a100", "80gb", use=0.45),  # A100 data sheet: 312 bf16 dense
    _gpu("a100-40gb", 39.4, 312, 156, "a100", use=0.45),  # the same chip
    _gpu("l40s", 44.4, 362, 183, "l40s"),  # L40S data sheet: 733 bf16 sparse (362 dense)
    _gpu("a6000", 47.5, 154.8, 77.4, "rtx", "a6000"),  # GA102 white paper: 154.8 fp16 with fp32 accumulation
    _gpu("a10g", 22.1, 70, 35, "a10g"),  # AWS's A10 variant: 70 bf16 dense
    _gpu("a10", 22.1, 125, 62.5, "a10"),  # A10 data sheet: 125 bf16 dense
    _gpu("l4", 22.1, 121, 60, "l4"),  # L4 data sheet: 242 bf16 sparse
    _gpu("rtx-5090", 31.4, 209.5, 104.8, "5090"),  # RTX Blackwell white paper: 209.5 bf16 with fp32 accumulation, dense
    _gpu("rtx-4090", 23.5, 165.2, 82.6, "4090"),  # Ada white paper: 165.2 bf16 with fp32 accumulation, dense
    _gpu("rtx-3090", 23.6, 71, 35.6, "3090"),  # GA102 white paper: 71 bf16 with fp32 accumulation, dense
    _gpu("v100", 31.7, None, None, "v100", fp16=125),  # V100 data sheet: 125 fp16; no bf16
    _gpu("t4", 14.6, None, None, "t4", fp16=65),  # T4 data sheet: 65 fp16; no bf16
    # No peak is known for a CPU. 50 GFLOP/s is what two ordinary server cores sustain in fp32 in a whole training step
    # (docs/plan.md).
    Device("cpu", None, None, None, None, ("cpu",), 0.0, 50e9),
)
_ALIASES = {
    "24gb": "rtx-4090",
    "4090": "rtx-4090",
    "3090": "rtx-3090",
    "5090": "rtx-5090",
    "a100": "a100-80gb",
    "h100-sxm": "h100",
}


def device_names() -> list[str]:
    return [device.name for device in _DEVICES]


def device(name: str) -> Device:
    """The device of this name or alias. Raises InputError with the names there are."""
    wanted = name.lower().replace("_", "-").replace(" ", "-")
    wanted = _ALIASES.get(wanted, wanted)
    if found := next((known for known in _DEVICES if known.name == wanted), None) or find_device(name):
        return found
    near = difflib.get_close_matches(wanted, [*device_names(), *_ALIASES], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"--gpu: no device {name!r}; {hint}known: {', '.join(device_names())}")


def find_device(reported: str) -> Device | None:
    """The device that a driver reports as, for example, `NVIDIA A100-SXM4-80GB`; None where it is not known."""
    words = reported.lower().replace("-", " ").replace("_", " ").split()
    return next((known for known in _DEVICES if all(word in words for word in known.matches)), None)


def resolve_precision(precision: str, device: str, *, has_bf16: bool, width: int) -> str:
    """What a precision of the recipe comes to: `auto` is bf16 on a GPU that has it, and on a CPU that has it for a
    model of a width that gains by it; else fp32.

    device: "cpu", or a GPU by any name. width: the model's hidden size. Raises InputError for bf16 on a GPU that has
    none.
    """
    on_gpu = device != "cpu"
    if precision == "auto":
        return "bf16" if has_bf16 and (on_gpu or width >= WIDE_ON_CPU) else "fp32"
    if precision.startswith("bf16") and on_gpu and not has_bf16:
        raise InputError(f"train.precision: found {precision}, but {device} has no bf16; use fp16 or fp32")
    return precision


def peak_of(known: Device, precision: str) -> float | None:
    """Dense peak in FLOP/s for a resolved precision (fp32 runs as TF32)."""
    return {"bf16": known.bf16, "bf16_full": known.bf16, "fp16": known.fp16, "fp32": known.tf32}[precision]


def device_peak_flops(name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of the device a driver reports by `name`; None where it is not known, so
    that MFU reads n/a.
    """
    known = find_device(name)
    return None if known is None else peak_of(known, precision)


# A GPU process cannot have all of its card: what the allocator cannot use for fragmentation.
USABLE = 0.95
# Tokens of a micro-batch at which a GPU reaches half of its speed, and at which `Device.expected_use` holds: the
# family's own throughput at micro-batches of 1, 2, 4 and 8 rows of 2,048 was 0.46, 0.72, 0.96 and 1 of the best
# (docs/plan.md).
HALF_SPEED_TOKENS, FULL_SPEED_TOKENS = 2048, 16384
# Parameters of a model that reaches half of `Device.expected_use`: small products leave a GPU waiting for its kernels
# (docs/plan.md has the figures it was chosen by).
HALF_USE_PARAMETERS = 100e6
# On a CPU larger micro-batches only leave the caches.
CPU_TOKENS = 4096
# Hidden size from which a CPU that multiplies bf16 takes it: a choice, held to measurements at 192, 320 and 576
# (docs/log.md, docs/benchmarks.md).
WIDE_ON_CPU = 192
_GPU_COUNTS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)
_GPU_NAMES = ("rtx-4090", "a100-40gb", "a100-80gb", "h100", "h200", "b200")


@dataclass(frozen=True)
class Choice:
    """One way to run a step: what a device holds at its peak and sends, and its speed relative to an unhindered one.

    idle: share of a step in which it waits in a pipeline. instead_of: what the first layout tried holds at least, where
    that does not fit.
    """

    setup: Setup
    micro_batches: int
    layout: Layout
    memory: Memory
    traffic: list[Sent]
    speed: float
    fits: bool
    idle: float = 0.0
    instead_of: tuple[Layout, float] | None = None


def usable_memory(known: Device, gpus: int) -> float:
    """Bytes a training process may use: of its card, or its share of this machine's memory on a CPU, where all
    processes are together.
    """
    return USABLE * (machine_memory() / gpus if known.memory is None else known.memory)


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
    """The fastest choice that fits in the first layout where one does, as `layouts` orders them. Where none does, the
    one that needs least. Raises InputError for degrees that do not make the devices.
    """
    if gpus < 1:
        raise InputError(f"--gpus: found {gpus}, expected at least 1")
    limit = usable_memory(known, gpus)
    choices: list[Choice] = []
    first: tuple[Layout, float] | None = None
    for layout in layouts(recipe, shape, gpus, known.node):
        found = list(_choices(recipe, shape, known, layout, limit))
        if fitting := [choice for choice in found if choice.fits]:
            best = max(fitting, key=lambda choice: (choice.speed, -choice.memory.total))
            return replace(best, instead_of=first)
        choices += found
        first = first or (layout, min(choice.memory.total for choice in found))
    return min(choices, key=lambda choice: choice.memory.total)


def _choices(recipe: Recipe, shape: ModelShape, known: Device, layout: Layout, limit: float) -> Iterator[Choice]:
    """One choice for each way of checkpointing and of computing the loss that the recipe leaves open, each with its
    largest micro-batch.
    """
    train, cpu = recipe.train, known.name == "cpu"
    has_bf16 = multiplies_bf16() if cpu else known.bf16 is not None or known.fp16 is None
    ways = [(train.activation_checkpointing, train.checkpointing_stride)]
    if train.activation_checkpointing == "auto":
        ways = [("none", 2), ("every_nth", train.checkpointing_stride), ("full", 1)]
    best = FULL_SPEED_TOKENS / (FULL_SPEED_TOKENS + HALF_SPEED_TOKENS)
    for checkpointing, stride in ways:
        for loss in ("full", "chunked") if train.loss == "auto" else (train.loss,):
            setup = Setup(
                rows=1,
                sequence_length=recipe.data.sequence_length,
                precision=resolve_precision(train.precision, known.name, has_bf16=has_bf16, width=shape.hidden_size),
                activation_checkpointing=checkpointing,
                checkpointing_stride=stride,
                loss=loss,
                loss_chunk=train.loss_chunk,
                optimizer=recipe.optim.name,
                muon_width=2 if recipe.optim.muon_dtype == "bfloat16" else 4,
                cpu=cpu,
                shard=layout.parts,
                tensor=layout.tensor,
                context=layout.context,
                pipeline=layout.pipeline,
                schedule=recipe.parallel.schedule,
                stages=recipe.parallel.stages if recipe.parallel.schedule == "interleaved" else 1,
            )
            setup = _with_micro_rows(recipe, shape, setup, layout, limit)
            memory = memory_of(shape, setup)
            if cpu:  # the libraries share the memory with the tensors, and a run's peak memory counts both
                memory = Memory({**memory.parts, "libraries": LIBRARIES_CPU}, memory.peak)
            tokens = setup.tokens
            micro_speed = 1.0 if cpu else min(1.0, tokens / (tokens + HALF_SPEED_TOKENS) / best)
            speed = micro_speed * 3 / (3 + setup.share_recomputed(shape.num_hidden_layers)) * layout.speed
            idle = idle_share(layout.pipeline, setup.stages, setup.micro_batches)
            speed *= 1 - idle
            traffic = traffic_of(shape, setup, layout, setup.micro_batches, known.name)
            speed *= _share_of_step(recipe, shape, known, setup, layout, speed, traffic)
            yield Choice(setup, setup.micro_batches, layout, memory, traffic, speed, memory.total <= limit, idle)


def _share_of_step(
    recipe: Recipe, shape: ModelShape, known: Device, setup: Setup, layout: Layout, speed: float, traffic: list[Sent]
) -> float:
    """The share of a step in which a device computes, on average. A step takes as long as the device with most rows
    computes, or as each sends, whichever is longer: the shorter of the two is assumed to be hidden.
    """
    rows = rows_of_step(recipe, layout)
    even = recipe.batch.tokens_per_step / setup.sequence_length / (rows * layout.data_parallel)
    rate, sending = full_speed(known, setup, shape)[1], sending_seconds(traffic)
    if rate is None or sending is None:
        return even
    computing = rows * setup.sequence_length / (layout.inner * rate * speed)
    return even * computing / max(computing, sending)


def running_device(name: str, memory: float | None = None) -> Device:
    """The device a run is on: as its driver names it ("cpu" for a CPU), with `memory` bytes in all where they are
    known.
    """
    known = find_device(name) or Device(name, memory, None, None, None)
    return known if memory is None or known.name == "cpu" else replace(known, memory=memory)


def rows_of_step(recipe: Recipe, layout: Layout) -> int:
    """Rows of the global batch that the busiest device reads."""
    return math.ceil(recipe.batch.tokens_per_step / recipe.data.sequence_length / layout.data_parallel)


def _with_micro_rows(recipe: Recipe, shape: ModelShape, setup: Setup, layout: Layout, limit: float) -> Setup:
    """The recipe's micro-batch, or the largest that fits, evened out over the micro-batches of a step; a pipeline has
    at least as many as stages where there are rows for them.
    """
    share = rows_of_step(recipe, layout)
    most = max(1, share // layout.pipeline)
    # DDP's, which live from step to step.
    buckets = layout.copies > 1 and layout.parts == layout.pipeline == 1

    def with_rows(rows: int) -> Setup:
        return replace(setup, rows=rows, accumulates=rows < share or buckets, micro_batches=math.ceil(share / rows))

    if isinstance(recipe.batch.micro, int):
        return with_rows(min(recipe.batch.micro, share))
    if setup.cpu:
        return with_rows(max(1, min(most, CPU_TOKENS // setup.sequence_length)))
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if memory_of(shape, with_rows(middle)).total <= limit else (low, middle - 1)
    return with_rows(math.ceil(share / math.ceil(share / low)))


def full_speed(known: Device, setup: Setup, shape: ModelShape) -> tuple[float | None, float | None]:
    """(assumed MFU, tokens a second) of one device that nothing hinders. MFU is None where a sustained rate is assumed
    instead, both where nothing is known.
    """
    peak, flops = peak_of(known, setup.precision), shape.flops_per_token(setup.sequence_length)
    if peak is None:
        return None, known.sustained / flops if known.sustained else None
    parameters = shape.parameters()
    mfu = known.expected_use * parameters / (parameters + HALF_USE_PARAMETERS)
    return mfu, mfu * peak / flops


def expected_rate(choice: Choice, known: Device, gpus: int, shape: ModelShape) -> tuple[float | None, float | None]:
    """`full_speed` at the speed of a choice: of each device, and over all."""
    mfu, rate = full_speed(known, choice.setup, shape)
    return mfu and mfu * choice.speed, rate and gpus * rate * choice.speed


def what_would_fit(recipe: Recipe, shape: ModelShape, known: Device, gpus: int) -> str:
    """What could hold the run: these devices in other degrees, the smallest number of them, the smallest other device
    in this number, a narrower precision.
    """
    found = []
    train = replace(recipe.train, activation_checkpointing="auto", loss="auto")
    chosen = replace(recipe, train=train, batch=replace(recipe.batch, micro="auto"))
    if chosen != recipe and _layout_that_fits(chosen, shape, known, gpus):
        found.append(f"{gpus} x {known.name} with batch.micro, train.activation_checkpointing and train.loss at auto")
    asked = recipe.parallel
    opened = replace(recipe, parallel=replace(asked, replicate=0, shard=0))
    wide = replace(recipe, parallel=replace(opened.parallel, tensor=0, pipeline=0))
    least = known.memory or machine_memory()
    larger = [other for other in map(device, _GPU_NAMES) if (other.memory or 0) > least]
    for places in (
        [(opened, gpus, known), (wide, gpus, known)],
        [(opened, count, known) for count in _GPU_COUNTS if count > gpus],
        [(opened, gpus, other) for other in larger],
    ):
        for other, count, card in places:
            if (layout := _layout_that_fits(other, shape, card, count)) is None:
                continue
            flags = [f"--gpus {count}"] * (count > gpus)
            for name, size in asdict(layout).items():
                if name != "replicate" and getattr(asked, name) not in (0, size):
                    flags.append(f"--parallel.{name} {size}")
            found.append(f"{count} x {card.name}" + (f" ({', '.join(flags)})" if flags else ""))
            break
    if recipe.train.precision != "bf16_full" and known.bf16:
        narrow = replace(recipe, train=replace(recipe.train, precision="bf16_full"))
        if _layout_that_fits(narrow, shape, known, gpus):
            found.append(f"{gpus} x {known.name} with weights and moments in bf16 (--train.precision bf16_full)")
    return (
        "would fit on " + " or ".join(found)
        if found
        else "fits on no layout that this plan knows; use a smaller model or shorter rows"
    )


def _layout_that_fits(recipe: Recipe, shape: ModelShape, known: Device, gpus: int) -> Layout | None:
    try:
        choice = best_choice(recipe, shape, known, gpus)
    except InputError:
        return None
    return choice.layout if choice.fits else None
