"""Degrees of parallelism that a recipe leaves `auto`: what they come to on the devices at hand, and why."""

from __future__ import annotations

from dataclasses import asdict, replace

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.keys import without_idle_keys
from argonne.plan.devices import Choice, Device, best_choice, usable_memory, what_would_fit
from argonne.plan.shape import as_trained, shape_of


def settle(recipe: Recipe, device: Device, devices: int, *, overrun: bool = False) -> tuple[Recipe, str | None]:
    """The recipe with every degree a number, and the line that tells them; as it is where none is `auto`. Raises
    InputError where no degrees hold the model, unless `overrun`, and where none make the devices.
    """
    if not recipe.parallel.open:
        return recipe, None
    choice = choose(as_trained(recipe), device, devices, overrun=overrun)
    parallel = replace(recipe.parallel, **asdict(choice.layout))
    given = recipe.given - {"parallel.schedule", "parallel.stages"}  # do nothing without a pipeline
    settled = without_idle_keys(replace(recipe, parallel=parallel, given=given))
    said = {f"parallel.{name}" for name in asdict(choice.layout)}
    return replace(settled, given=recipe.given | said), reason(recipe, choice, device, devices)


def choose(recipe: Recipe, device: Device, devices: int, *, overrun: bool = False) -> Choice:
    """The best choice. Raises InputError where the recipe's own degrees do not fit, unless `overrun`."""
    shape = shape_of(recipe.model, recipe.data.sequence_length)
    choice = best_choice(recipe, shape, device, devices)
    advice = None if choice.fits else what_would_fit(recipe, shape, device, devices)
    if (why := misfit(recipe, choice, device, devices, advice)) and not overrun:
        raise InputError(why)
    return choice


def reason(recipe: Recipe, choice: Choice, device: Device, devices: int) -> str | None:
    """The degrees of a choice, and why these; None where the recipe leaves none open."""
    if not recipe.parallel.open:
        return None
    took = f"a step takes {choice.memory.total / 1e9:.1f} GB"
    told = f"{took} of the {usable_memory(device, devices) / 1e9:.1f} GB usable on each {device.name}"
    if choice.instead_of is not None:
        before, size = choice.instead_of
        told += f", and with {before.told} {size / 1e9:.1f} GB"
    return f"{choice.layout.told} (auto): {told}"


def misfit(recipe: Recipe, choice: Choice, device: Device, gpus: int, advice: str | None) -> str | None:
    """Why a run with the recipe's own degrees would not fit, and what would; None where it fits."""
    if choice.fits and recipe.parallel.shard in (0, choice.layout.shard):
        return None
    if choice.fits:
        return (
            f"memory: a whole copy does not fit on one {device.name}; this plan shards weights, gradients and moments, "
            f"so start it with --parallel.shard {choice.layout.shard}"
        )
    return (
        f"memory: a step is planned with {choice.memory.total / 1e9:.2f} GB on each {device.name}, of "
        f"{usable_memory(device, gpus) / 1e9:.2f} GB usable; {advice}; or say --allow memory"
    )
