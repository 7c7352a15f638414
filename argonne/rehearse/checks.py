"""What can be told of the real run, unshrunk, without running anything: mesh, memory, disk, time, folder."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from argonne.config import CHAT_STAGES, Recipe
from argonne.errors import InputError
from argonne.files import human
from argonne.keys import check_mesh, check_schedule, parse_deadline, parse_duration
from argonne.layout import last_checkpoint
from argonne.plan import device, settle
from argonne.plan.build import over_read, plan_of, source_uses, tokens_before
from argonne.plan.shape import ARCHITECTURE, as_trained, fitted, shape_of, vocabulary_of
from argonne.rehearse.shrink import real_steps

# Copies of float32 weights that a checkpoint holds: themselves and the optimizer's moments.
COPIES = {"adamw": 3, "muon": 2}


@dataclass(frozen=True)
class Machine:
    """Where the real run will be. gpus: on all its nodes, 0: not known. gpu: as `argonne plan` names it. seconds: of a
    job, before it is asked to stop.
    """

    gpus: int = 0
    gpu: str | None = None
    seconds: float | None = None


def real_recipe(recipe: Recipe, former: Recipe | None) -> Recipe:
    """The recipe with the model that the real run will have; former: as this returned it, of the run whose weights it
    starts from. Raises InputError where the two contradict one another, or the data's tokenizer does.
    """
    if former is None:
        return as_trained(recipe)
    known = {name: getattr(former.model, name) for name in ARCHITECTURE}
    return fitted(recipe, None if recipe.stage in CHAT_STAGES else vocabulary_of(recipe.data), known)


def settled(recipe: Recipe, machine: Machine) -> Recipe:
    """The recipe with the degrees that the real run will have. Raises InputError where the machine is not told."""
    workers = recipe.parallel.nproc or machine.gpus
    if (opened := recipe.parallel.open) and (not workers or (machine.gpus and not machine.gpu)):
        raise InputError(
            f"parallel.{opened[0]}: found auto, and the devices of the real run are not known; give --gpus and --gpu, "
            "or a number"
        )
    return settle(recipe, device(machine.gpu or "cpu"), workers)[0]


def check_run(recipe: Recipe, folder: Path, machine: Machine) -> None:
    """Raise InputError for what would end the real run, or the first job of it. recipe: of `real_recipe`."""
    _check_folder(recipe, folder)
    if machine.gpus:
        check_mesh(recipe.parallel, recipe.parallel.nproc or machine.gpus)
    steps = real_steps(recipe)
    if steps is not None:
        check_schedule(steps, recipe.schedule)
    if recipe.stage not in CHAT_STAGES:
        tokens = None if steps is None else tokens_before(recipe.batch, steps)
        for refusal in over_read(source_uses(recipe.data, tokens)):
            raise InputError(f"data.sources: {refusal}; take fewer steps, or allow more passes")
    step_seconds = None
    if machine.gpu is not None:
        plan = plan_of(recipe, gpu=machine.gpu, gpus=machine.gpus or 1)
        if plan.refusals:
            raise InputError(f"the run will be refused: {plan.refusals[0]}")
        step_seconds = plan.tokens_per_step / plan.tokens_per_second if plan.tokens_per_second else None
    _check_time(recipe, machine, step_seconds)


def _check_folder(recipe: Recipe, folder: Path) -> None:
    """A run that is there is one of this recipe, and the folder, or the nearest one above it, can be written."""
    place = existing(folder)
    try:
        if not place.is_dir():
            raise NotADirectoryError(f"{place} is a file")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(f"--run {folder}: cannot be written ({error}); make it writable, or choose another") from None
    if (last := last_checkpoint(folder)) is None:
        return
    from argonne.keys import is_free
    from argonne.stages.setup import changes
    from argonne.stages.start import Start
    from argonne.train.checkpoint import read_state

    found = changes(Start("", own=True, recipe_tree=read_state(last)["recipe"]), recipe)
    other = [f"{path}: {old!r} -> {new!r}" for path, (old, new) in found.items() if not is_free(path)]
    if other:
        raise InputError(f"--run {folder}: belongs to another recipe ({'; '.join(other)}); give another --run")


def existing(path: Path) -> Path:
    """The path, or the nearest place above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))


def bytes_needed(recipe: Recipe) -> int:
    """What a real run takes of the disk at most: the checkpoints it keeps and the one it writes, the final model, an
    export.
    """
    width = 2 if recipe.train.precision == "bf16_full" else 4
    kept = recipe.checkpoint.keep_last + recipe.checkpoint.keep_best + 1
    return shape_of(recipe.model).parameters() * width * (COPIES[recipe.optim.name] * kept + 2)


def check_disk(needs: list[tuple[Path, int]]) -> None:
    """needs: (run folder, bytes). Raise InputError where a disk has not what the runs on it need together."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needs:
        place = existing(folder)
        first, total = disks.get(place.stat().st_dev, (folder, 0))
        disks[place.stat().st_dev] = first, total + size
    for folder, size in disks.values():
        free = shutil.disk_usage(existing(folder)).free
        if free < size:
            raise InputError(
                f"--run {folder}: its disk has {human(free)} bytes free, and checkpoints and exports will take "
                f"{human(size)}; make room, keep fewer (checkpoint.keep_last), or choose another disk"
            )


def _check_time(recipe: Recipe, machine: Machine, step_seconds: float | None) -> None:
    """The first save comes before the run is asked to stop."""
    save = recipe.checkpoint
    waits = []
    if save.every_minutes:
        waits.append((save.every_minutes * 60, "checkpoint.every_minutes"))
    if save.every_steps and step_seconds is not None:
        waits.append((save.every_steps * step_seconds, "checkpoint.every_steps"))
    first, key = min(waits, default=(0.0, ""))
    limits = {"--time": machine.seconds}
    if recipe.stop.wall_time:
        limits["stop.wall_time"] = parse_duration(recipe.stop.wall_time, "stop.wall_time")
    if recipe.stop.deadline:
        limits["stop.deadline"] = parse_deadline(recipe.stop.deadline, "stop.deadline") - time.time()
    for name, seconds in limits.items():
        if seconds is not None and seconds <= first:
            raise InputError(
                f"{name}: ends the run {max(0.0, seconds):,.0f} s after its start, and its first save comes after "
                f"{first:,.0f} s ({key}); give it more time, or save sooner"
                if first
                else f"{name}: has passed; give a later one"
            )
