"""Checkpoints: complete and verified, or absent. Tensors in safetensors under flat names, everything else in
state.json; never a pickle.

Order of a save: temporary folder, tensors (hashed as they are written) and their fsync, state, list of hashes, names
read back, rename, fsync of the parent, `checkpoint_last`, and only then prune. Whole files are read back at a resume.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from argonne.config import CheckpointSection
from argonne.errors import InputError
from argonne.files import (
    TEMPORARY,
    collect_temporaries,
    fsync_path,
    hash_list_of,
    publish_directory,
    quick_hash,
    read_json,
    seal_directory,
    verify_directory,
    write_json,
    write_text,
)
from argonne.layout import LAST, METRICS, STATE, STATE_VERSION, WEIGHTS, checkpoint_name, last_checkpoint, step_in_name
from argonne.model.stored import StoredTensors, is_finite
from argonne.parallel.mesh import Mesh
from argonne.train.optim import optimizer_tensors
from argonne.train.tensor_files import HashingWriter, bytes_of


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint on disk."""

    path: Path
    step: int


def checkpoint_path(run: Path, step: int) -> Path:
    return run / checkpoint_name(step)


def run_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under `model.<name>` (a tied weight once, under its first name), and the
    optimizer's: live, not copies.
    """
    kept = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    state = model.state_dict()
    found = {f"model.{name}": state[name] for name in state if name in kept}
    return found | (optimizer_tensors(optimizer) if optimizer is not None else {})


class NonFiniteWeights(RuntimeError):
    """A weight is not finite: the save is refused and the last good checkpoint stays."""


def check_finite(model: nn.Module, mesh: Mesh) -> None:
    """Raise NonFiniteWeights naming the first parameters that hold NaN or infinity: on every rank, when it is so on any
    of them.
    """
    mine = []
    for name, parameter in model.named_parameters():
        held = parameter.detach()
        if not is_finite(held.to_local() if isinstance(held, DTensor) else held):
            mine.append(name)
    for rank, names in enumerate(mesh.gather(mine)):
        if names:
            where = f" on rank {rank}" if mesh.world_size > 1 else ""
            raise NonFiniteWeights(
                f"{len(names)} tensors hold non-finite values{where} ({', '.join(names[:3])}): the checkpoint is "
                "refused"
            )


def check_ends(model: nn.Module, mesh: Mesh) -> None:
    """Raise RuntimeError where two stages of a pipeline hold other bits of a weight that both of them train."""
    if mesh.pipeline == 1:
        return
    width = mesh.world_size // mesh.pipeline  # ranks of a stage
    holders = Counter(name for names in mesh.gather([name for name, _ in model.named_parameters()]) for name in names)
    mine, known = {}, dict[tuple[str, int], str]()
    for name, parameter in model.named_parameters():
        if holders[name] > width:
            digest = quick_hash()
            digest.update(bytes_of(parameter.to_local() if isinstance(parameter, DTensor) else parameter))
            mine[name, mesh.rank % width] = digest.hexdigest()
    for rank, hashes in enumerate(mesh.gather(mine)):
        for (name, place), found in hashes.items():
            if known.setdefault((name, place), found) != found:
                raise RuntimeError(f"{name} on rank {rank} differs from what another stage holds and trains with it")


def save_checkpoint(
    run: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    mesh: Mesh,
    *,
    add_files: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write `checkpoint_step_<step>` on all ranks together and point `checkpoint_last` at it. `add_files` puts config
    and tokenizer beside.

    Raises OSError (disk full, read-only) after removing the temporary; earlier checkpoints are untouched.
    """
    names = set().union(*mesh.gather(set(tensors)))  # of a pipeline each rank has its own
    target = checkpoint_path(run, step)
    temporary = run / f"{TEMPORARY}{target.name}"
    writer = HashingWriter(temporary)

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces its own internal deprecations here
            dcp.save(dict(tensors), storage_writer=writer, process_group=mesh.agreement, no_dist=mesh.world_size == 1)

    def complete() -> None:
        write_json(temporary / STATE, {"format_version": STATE_VERSION, "step": step, **state})
        add_files(temporary)
        seal_directory(temporary, {name: seal for part in seals for name, seal in part.items()})
        if problems := unreadable_tensors(temporary, names):
            raise OSError(f"{target}: what was written does not read back: {'; '.join(problems[:3])}")
        if (metrics := run / METRICS).exists():
            fsync_path(metrics)  # the records of the steps that this checkpoint ends are as safe as it is
        publish_directory(temporary, target)
        point_last(run, target)

    try:
        _together(mesh, prepare if mesh.is_main else None)
        _together(mesh, write)
        seals = mesh.gather(writer.seals)
        _together(mesh, complete if mesh.is_main else None)
    except BaseException as error:
        if mesh.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(f"{error}{_shortage(run, tensors)}") from error
        raise


def _shortage(run: Path, tensors: dict[str, torch.Tensor]) -> str:
    """What to add to the message of a failed save where the disk is too small: how much it takes, how much is free, how
    much is missing.
    """
    saved = list_checkpoints(run)
    files = sum(path.stat().st_size for path in saved[-1].path.rglob("*") if path.is_file()) if saved else 0
    needed = max(files, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    free = shutil.disk_usage(run).free
    if free > needed:
        return ""
    return (
        f"; a checkpoint takes {needed / 1e6:,.2f} MB and {free / 1e6:,.2f} MB are free: {(needed - free) / 1e6:,.2f} "
        "MB are missing"
    )


def _together(mesh: Mesh, action: Callable[[], None] | None) -> None:
    """Run one phase on the ranks that have a part in it; when it fails anywhere it fails everywhere, and no rank waits
    for another.
    """
    problem: BaseException | None = None
    reason = ""
    try:
        if action is not None:
            action()
    except OSError as error:
        problem, reason = error, str(error)
    except CheckpointException as error:  # torch's, which carries the failures of all ranks
        first = next(iter(error.failures.values()))[0]
        problem, reason = error, f"{type(first).__name__}: {first}"
    if reasons := [found for found in mesh.gather(reason) if found]:
        raise OSError(reasons[0]) from problem


def unreadable_tensors(folder: Path, expected: set[str]) -> list[str]:
    """Open every safetensors file again; return what is missing or cannot be read."""
    found: set[str] = set()
    for path in sorted(folder.glob(WEIGHTS)):
        try:
            with safe_open(path, "pt") as file:
                found |= set(file.keys())
        except (SafetensorError, OSError) as error:
            return [f"{path}: {error}"]
    return (
        [f"{len(expected - found)} tensors are missing, such as {sorted(expected - found)[0]}"]
        if expected - found
        else []
    )


def point_last(run: Path, target: Path) -> None:
    """Let `checkpoint_last` lead to `target`: a link, or a file with its name on a file system without links."""
    temporary = run / f"{TEMPORARY}{LAST}"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target.name)
    except OSError:
        write_text(run / LAST, target.name + "\n")
    else:
        os.replace(temporary, run / LAST)
        fsync_path(run)


def list_checkpoints(run: Path) -> list[Saved]:
    """Folders with a checkpoint's name, oldest first; completeness is `verify`'s to say."""
    found = [(step, path) for path in run.glob(checkpoint_name("*")) if (step := step_in_name(path)) is not None]
    return [Saved(path, step) for step, path in sorted(found)]


def newest_complete(run: Path, log: Callable[[str], None], before: int | None = None) -> Saved | None:
    """The newest checkpoint whose hashes hold, of a step below `before`; a damaged one is passed over and named."""
    for saved in reversed(list_checkpoints(run)):
        if before is not None and saved.step >= before:
            continue
        problems = verify_directory(saved.path)
        if not problems:
            return saved
        log(f"passing over {saved.path}: {problems[0]}")
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises InputError for a folder that is none, or one written by a newer format."""
    if not (checkpoint / STATE).is_file():
        raise InputError(
            f"{checkpoint}: not an argonne checkpoint ({STATE} is missing); give a checkpoint_step_<N> folder"
        )
    state = read_json(checkpoint / STATE)
    version = state.get("format_version") if isinstance(state, dict) else None
    if not isinstance(version, int) or not 1 <= version <= STATE_VERSION:
        raise InputError(
            f"{checkpoint / STATE}: format version {version!r}, expected at most {STATE_VERSION}; a newer argonne "
            "wrote it"
        )
    return state


def load_tensors(checkpoint: Path, tensors: dict[str, torch.Tensor], mesh: Mesh) -> None:
    """Fill live tensors in place from a checkpoint of any number of ranks.

    All or nothing: every tensor is there with its full shape and nothing is left over, else InputError naming the first
    differences.
    """
    shapes = mesh.gather({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    wanted = {name: shape for part in shapes for name, shape in part.items()}
    stored = StoredTensors(checkpoint).shapes
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - stored.keys())]
    problems += [f"{name} is unknown here" for name in sorted(stored.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & stored.keys()):
        if stored[name] != wanted[name]:
            problems.append(f"{name} is {stored[name]}, expected {wanted[name]}")
    if problems:
        raise InputError(
            f"{checkpoint}: not a checkpoint of this model and optimizer: {'; '.join(problems[:3])} ({len(problems)} "
            "differences)"
        )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        reader = HuggingFaceStorageReader(str(checkpoint))
        dcp.load(dict(tensors), storage_reader=reader, process_group=mesh.agreement, no_dist=mesh.world_size == 1)


def prune(run: Path, keep: CheckpointSection, best_step: int | None, log: Callable[[str], None]) -> list[Path]:
    """Delete checkpoints that no rule keeps, oldest first, printing each. Called only after a newer one is complete and
    verified.

    `keep_last` counts complete checkpoints up to the newest save: a damaged one that the run resumed before never takes
    the place of a good one, wherever its step is. Those beyond the newest save stay until the run gets there.
    """
    newest = step_in_name(last) if (last := last_checkpoint(run)) else None
    saved = [item for item in list_checkpoints(run) if newest is None or item.step <= newest]
    whole = [item.step for item in saved if not verify_directory(item.path, hashes=False)]
    kept = set(whole[-max(1, keep.keep_last) :])
    if keep.keep_every:
        kept |= {item.step for item in saved if item.step % keep.keep_every == 0}
    if keep.keep_best and best_step is not None:
        kept.add(best_step)
    removed = []
    for item in saved:
        if item.step not in kept:
            _remove(item.path)
            removed.append(item.path)
            log(f"removed {item.path.name} (kept: {', '.join(str(step) for step in sorted(kept))})")
    return removed


def rewind(run: Path, step: int, log: Callable[[str], None]) -> None:
    """Go back to the checkpoint of `step`: later ones are removed, each by name. The caller holds the run's lock.

    Raises InputError, before anything is removed, where that checkpoint is not there or not whole.
    """
    target = checkpoint_path(run, step)
    if not target.exists() or (problems := verify_directory(target)):
        there = ", ".join(str(saved.step) for saved in list_checkpoints(run)) or "none"
        found = problems[0] if target.exists() else f"no {target.name}"
        raise InputError(f"--rewind {step}: {run}: {found}; checkpoints there: {there}")
    point_last(run, target)
    for saved in list_checkpoints(run):
        if saved.step > step:
            _remove(saved.path)
            log(f"removed {saved.path.name} (--rewind {step})")


def _remove(path: Path) -> None:
    """The hash list goes first: a deletion that is cut short leaves a folder that says it is not complete."""
    hash_list_of(path).unlink(missing_ok=True)
    shutil.rmtree(path)


def clean_leftovers(run: Path, log: Callable[[str], None]) -> None:
    """Remove temporaries of killed saves and finish what a kill after the last rename left undone. The caller holds the
    run's lock.
    """
    for path in collect_temporaries(run):
        log(f"removed {path.name}, left by an interrupted write")
    last = run / LAST
    if last.is_dir() and not last.is_symlink():  # a copy that followed the link: the same checkpoint once more
        own = run / checkpoint_name(read_state(last)["step"])
        if own.exists() and not verify_directory(own):
            shutil.rmtree(last)
        else:
            shutil.rmtree(own, ignore_errors=True)
            last.rename(own)
        log(f"{LAST} was a folder, as a copy makes of a link; the checkpoint is {own.name}")
    whole = [saved.path for saved in list_checkpoints(run) if not verify_directory(saved.path, hashes=False)]
    if whole and last_checkpoint(run) != whole[-1].resolve():
        point_last(run, whole[-1])
