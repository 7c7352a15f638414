"""`make_plan`: what a recipe will take on a device: memory by part, largest micro-batch, hours, cost, and what does not
close.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.config import BatchSection, DataSection, Recipe
from argonne.errors import InputError
from argonne.keys import batches, check_schedule
from argonne.plan import devices
from argonne.plan.degrees import choose, misfit, reason
from argonne.plan.devices import (
    Choice,
    Device,
    best_choice,
    expected_rate,
    usable_memory,
    what_would_fit,
)
from argonne.plan.memory import Setup
from argonne.plan.mesh import refusal_of, sending_seconds
from argonne.plan.published import MEASURED, PUBLISHED, SOURCE_TOKENS, Measured
from argonne.plan.shape import as_trained, shape_of, weights_on_disk
from argonne.presets import preset

CONVENTION = (
    "6 FLOPs a weight of a matrix product and token (head counted, embedding look-up not) + 12 x query width x keys "
    "seen a layer"
)
CHOSEN = ("activation_checkpointing", "checkpointing_stride", "loss")  # of the keys that may be left to a plan
SMALL = 50_000_000  # parameters under which a plan without --gpu is one for the CPU


@dataclass(frozen=True)
class Plan:
    """What `argonne plan` prints and a run keeps. Memory in bytes of one device, speeds for all devices together.

    traffic: what one device sends in a step, by kind; traffic_seconds: how long that takes, None where no link is
    known. layout_reason: of degrees that are `auto`. idle_share: of a step, in which the ranks of a pipeline wait.
    past_errors: speed as planned / speed as measured, of releases whose speed is known. refusals: why no run
    would start.
    """

    recipe: str | None
    stage: str
    preset: str | None
    parameters: int
    flops_per_token: float
    flops_convention: str
    device: str
    devices: int
    layout: dict[str, int]
    layout_reason: str | None
    precision: str
    sequence_length: int
    tokens_per_step: int
    micro_rows: int
    micro_batches: int
    micro_is_given: bool
    activation_checkpointing: str
    checkpointing_stride: int
    loss: str
    memory: dict[str, float]
    memory_peak: str
    memory_total: float
    memory_limit: float | None
    fits: bool
    advice: str | None
    traffic: list[dict[str, Any]]
    traffic_seconds: float | None
    idle_share: float
    steps: int | None
    tokens: int | None
    expected_mfu: float | None
    tokens_per_second: float | None
    hours: float | None
    device_hours: float | None
    cost: float | None
    published_hours: float | None
    past_errors: dict[str, float]
    sources: list[dict[str, Any]]
    refusals: list[str]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them and a run stores them."""
        return asdict(self)


def make_plan(
    recipe: Recipe,
    *,
    gpu: str | Device | None = None,
    gpus: int = 1,
    price: float | None = None,
    name: str | None = None,
) -> Plan:
    """The plan of `recipe` on `gpus` devices called `gpu`, at `price` a device and hour.

    gpu: a name of `device_names()`; None: the CPU under 50M parameters, one H200 otherwise. name: the packaged recipe,
    so that published figures are told. Raises InputError for an unknown device or model size.
    """
    start, fit = recipe.model.init_from, as_trained(recipe)
    plan = plan_of(fit, gpu=gpu, gpus=gpus, price=price, name=name)
    if start is None or weights_on_disk(start) is not None:
        return plan
    note = f"model.init_from {start} is not on this disk: the sizes are those that the recipe gives"
    return replace(plan, warnings=[note, *plan.warnings])


def plan_of(
    recipe: Recipe, *, gpu: str | Device | None, gpus: int, price: float | None = None, name: str | None = None
) -> Plan:
    """`make_plan` of a recipe whose model is complete."""
    shape = shape_of(recipe.model, recipe.data.sequence_length)
    default = "cpu" if shape.parameters() < SMALL else "h200"
    device = gpu if isinstance(gpu, Device) else devices.device(gpu or default)
    choice = best_choice(recipe, shape, device, gpus)
    steps = total_steps(recipe, partial(tokens_before, recipe.batch), lambda: tokens_per_epoch(recipe.data))
    tokens = None if steps is None else tokens_before(recipe.batch, steps)
    mfu, rate = expected_rate(choice, device, gpus, shape) if choice.fits else (None, None)
    hours = tokens / rate / 3600 if tokens is not None and rate else None
    uses = source_uses(recipe.data, tokens, SOURCE_TOKENS.get(name or ""))
    advice = None if choice.fits else what_would_fit(recipe, shape, device, gpus)
    misfits = (_unscheduled(recipe, steps), misfit(recipe, choice, device, gpus, advice))
    refusals = [why for why in (refusal_of(recipe, choice.layout), *misfits, *over_read(uses)) if why]
    return Plan(
        recipe=name,
        stage=recipe.stage,
        preset=recipe.model.preset,
        parameters=shape.parameters(),
        flops_per_token=shape.flops_per_token(recipe.data.sequence_length),
        flops_convention=CONVENTION,
        device=device.name,
        devices=gpus,
        layout=asdict(choice.layout),
        layout_reason=reason(recipe, choice, device, gpus),
        precision=choice.setup.precision,
        sequence_length=recipe.data.sequence_length,
        tokens_per_step=recipe.batch.tokens_per_step,
        micro_rows=choice.setup.rows,
        micro_batches=choice.micro_batches,
        micro_is_given=isinstance(recipe.batch.micro, int),
        **{name: getattr(choice.setup, name) for name in CHOSEN},
        memory=choice.memory.parts,
        memory_peak=choice.memory.peak,
        memory_total=choice.memory.total,
        memory_limit=usable_memory(device, gpus),
        fits=choice.fits,
        advice=advice,
        traffic=[asdict(sent) for sent in choice.traffic],
        traffic_seconds=sending_seconds(choice.traffic),
        idle_share=choice.idle,
        steps=steps,
        tokens=tokens,
        expected_mfu=mfu,
        tokens_per_second=rate,
        hours=hours,
        device_hours=hours and hours * gpus,
        cost=None if hours is None or price is None else hours * gpus * price,
        published_hours=PUBLISHED[name].hours if name in PUBLISHED else None,
        past_errors={run.release: planned_rate(run) / run.tokens_per_second for run in MEASURED},
        sources=[asdict(use) for use in uses],
        refusals=refusals,
        warnings=_warnings(recipe, name, tokens, uses, refusals, choice, device),
    )


def planned_rate(run: Measured) -> float:
    """Tokens a second as this plan would have foretold them for a run of earlier code, at micro-batches of its own."""
    length, device = run.sequence_length, devices.device(run.device)
    recipe = Recipe(data=DataSection(sequence_length=length), batch=BatchSection(1024 * length))
    shape = shape_of(preset(run.preset).fields, length)
    choice = best_choice(recipe, shape, device, run.devices)
    return expected_rate(choice, device, run.devices, shape)[1] or 0.0


def choose_setup(recipe: Recipe, device: Device, world_size: int = 1, *, overrun: bool = False) -> Setup:
    """Micro-batch, activation checkpointing and loss for a run that is about to start, the recipe's own where it names
    them. Raises InputError where the run cannot fit, unless `overrun`.
    """
    return choose(_replicated(recipe, world_size), device, world_size, overrun=overrun).setup


def plan_of_run(recipe: Recipe, setup: Setup, device: Device, world_size: int = 1) -> dict[str, Any]:
    """The plan of a run as it really starts, to be stored with it: `inspect` sets it beside what was measured
    (`compare_plan`).
    """
    chosen = {name: getattr(setup, name) for name in CHOSEN}
    settled = replace(recipe, batch=replace(recipe.batch, micro=setup.rows), train=replace(recipe.train, **chosen))
    return plan_of(_replicated(settled, world_size), gpu=device, gpus=world_size).to_dict()


def _replicated(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe with every worker a replica where it leaves the layout open, as the trainer starts them."""
    asked = recipe.parallel
    if asked.replicate or asked.shard * asked.tensor * asked.context * asked.pipeline > 1:
        return recipe
    return replace(recipe, parallel=replace(asked, replicate=world_size))


def _unscheduled(recipe: Recipe, steps: int | None) -> str | None:
    """Why the schedule does not fit into the run; None where it does."""
    try:
        if steps is not None:
            check_schedule(steps, recipe.schedule)
    except InputError as error:
        return str(error)
    return None


def over_read(uses: list[SourceUse]) -> list[str]:
    """The sources on this disk that a run would read more often than it may."""
    return [
        f"source {use.path} would be read {use.passes:.2f} times, more than its max_epochs {use.max_epochs:g}"
        for use in uses
        if use.here and use.passes is not None and use.passes > use.max_epochs
    ]


def _warnings(
    recipe: Recipe,
    name: str | None,
    tokens: int | None,
    uses: list[SourceUse],
    refusals: list[str],
    choice: Choice,
    device: Device,
) -> list[str]:
    """What the reader must know beside the figures: contradictions, unknowns, assumptions that bite."""
    found = [f"the run will be refused: {reason}" for reason in refusals]
    if name in PUBLISHED and (contradiction := PUBLISHED[name].contradiction()):
        found.append(contradiction)
    found += [
        f"source {use.path} is not on this disk: passes over it are not known" for use in uses if use.tokens is None
    ]
    if recipe.data.input:
        found.append(
            f"data.input ({', '.join(recipe.data.input)}) is tokenised as the run goes: passes over it are not known"
        )
    if tokens is None:
        found.append(
            "the run's length is in epochs of data that is not on this disk: steps, hours and cost are not known"
        )
    if recipe.batch.tokens_per_step < choice.layout.data_parallel * recipe.data.sequence_length:
        found.append(
            f"a step has {recipe.batch.tokens_per_step // recipe.data.sequence_length} rows for "
            f"{choice.layout.data_parallel} devices that read rows of their own: the others train on nothing"
        )
    if choice.micro_batches < choice.layout.pipeline:
        found.append(
            f"a step has {choice.micro_batches} micro-batches for {choice.layout.pipeline} stages: each is idle for "
            f"{100 * choice.idle:.0f} % of it; make batch.micro smaller or the step larger"
        )
    if choice.layout.context > 1:
        found.append(
            "parallel.context: a part of a row attends under a dense mask, which is slower than the kernels that this "
            "speed assumes; it was not measured on GPUs"
        )
    if device.name == "cpu":
        found.append(
            f"the CPU's speed is an assumption, {(device.sustained or 0) / 1e9:.0f} GFLOP/s: the first log lines of a "
            "run tell the real one"
        )
    return found


@dataclass(frozen=True)
class SourceUse:
    """What a run takes from one source. `tokens`: how many one pass reads, `passes`: how often it is read; None where
    that is not known.

    `here`: read from the token set on this disk, not from the release's figures.
    """

    path: str
    share: float
    tokens: int | None
    passes: float | None
    max_epochs: float
    here: bool


def tokens_before(batch: BatchSection, step: int) -> int:
    """Tokens trained before optimizer step `step`."""
    parts = [(min(first, step), tokens) for _, first, tokens, _ in batches(batch)]
    ends = [first for first, _ in parts[1:]] + [step]
    return sum((end - first) * tokens for (first, tokens), end in zip(parts, ends, strict=True))


def steps_within(tokens_before: Callable[[int], int], tokens: int) -> int:
    """The most steps that draw at most `tokens` tokens: a run never trains on more than was asked for.
    `tokens_before(step)` rises with it.
    """
    low, high = 0, 1
    while tokens_before(high) <= tokens:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens_before(middle) <= tokens else (low, middle)
    return low


def total_steps(
    recipe: Recipe, tokens_before: Callable[[int], int], tokens_per_epoch: Callable[[], int | None]
) -> int | None:
    """Optimizer steps of the run; None where its length is in epochs of data that is not on this disk.

    tokens_before: tokens before a step, history and changes of batch included. tokens_per_epoch: asked only where the
    length is in epochs. Raises InputError for a length that makes no whole step.
    """
    train = recipe.train
    if train.steps is not None:
        return train.steps
    tokens = train.tokens
    if tokens is None:
        if (epoch := tokens_per_epoch()) is None:
            return None
        tokens = int((train.epochs or 0) * epoch)
    steps = steps_within(tokens_before, tokens)
    if steps < 1:
        raise InputError(
            f"train: {tokens:,} tokens make no whole step of batch.tokens_per_step = {recipe.batch.tokens_per_step:,}; "
            "train longer or take a smaller batch"
        )
    return steps


def check_length(recipe: Recipe) -> None:
    """Raise InputError where a new run makes no whole step, or its schedule does not fit into its steps, as far as the
    recipe alone tells: of epochs only the data does.
    """
    steps = total_steps(recipe, partial(tokens_before, recipe.batch), lambda: None)
    if steps is not None:
        check_schedule(steps, recipe.schedule)


def source_tokens(path: str, data: DataSection) -> int | None:
    """Training tokens that one pass over a prepared token set reads, from its manifest, and of single documents from
    its indices; None where there is none to read.
    """
    manifest, length = Path(path) / layout.MANIFEST, data.sequence_length
    if not manifest.is_file():
        return None
    held = json.loads(manifest.read_text())
    if data.documents == "packed":
        return held["tokens"] if isinstance(held.get("tokens"), int) else None
    rows = 0
    for shard in held.get("shards", []):
        index = manifest.with_name(shard["file"]).with_suffix(".idx")
        ends = array("Q", index.read_bytes())  # of each document, in tokens of the shard
        rows += sum(end - begin > length for begin, end in pairwise(chain([0], ends)))
    return rows * length


def tokens_per_epoch(data: DataSection) -> int | None:
    """Tokens until the first source is used up, each drawn in proportion to its weight: one pass over the mixture."""
    known = [(source_tokens(source.path, data), source.weight) for source in data.sources]
    total = sum(weight for _, weight in known)
    if not known or any(tokens is None for tokens, _ in known) or total <= 0:
        return None
    return min(int(tokens * total / weight) for tokens, weight in known if tokens is not None and weight > 0)


def source_uses(data: DataSection, tokens: int | None, released: int | None = None) -> list[SourceUse]:
    """What a run of `tokens` tokens takes from each source of the mixture. released: tokens of a sole source that is
    not on this disk.
    """
    total = sum(source.weight for source in data.sources) or 1.0
    uses = []
    for source in data.sources:
        share, found = source.weight / total, source_tokens(source.path, data)
        alone = len(data.sources) == 1 and data.documents == "packed"
        held = released if found is None and alone else found
        passes = share * tokens / held if held and tokens is not None else None
        uses.append(SourceUse(source.path, share, held, passes, source.max_epochs, found is not None))
    return uses
