"""How many rows a forward pass holds: found by trying before the run, halved where memory runs out in it. Tokens of a
step and their order never change.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from argonne.errors import InputError
from argonne.files import write_json
from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import MicroBatch, Objective
from argonne.parallel.parallelise import loss_of, placed
from argonne.train.data import Batches
from argonne.train.optim import Precision

# Allocator fragmentation and the longest row of a real run come on top of what two tries show.
HEADROOM = 0.95

MICRO_ROWS_FILE = "micro_rows.json"


def largest_that_fits(fits: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest number of rows from 1 to `most` that fits, up to an eighth; 1 is taken as it is. `fits` is asked as
    rarely as that allows.
    """
    low, high = 0, most + 1
    rows = max(1, min(guess, most))
    while True:
        if fits(rows):
            low = rows
        else:
            high = rows
        if low >= most or high - low <= max(1, low // 8):
            return max(1, low)
        rows = min(most, low + max(1, low // 4)) if high > most else (low + high) // 2


def probe_micro_rows(
    model: nn.Module,
    objective: Objective,
    precision: Precision,
    mesh: Mesh,
    micro_of: Callable[[int], MicroBatch],
    *,
    guess: int,
    most: int,
) -> int:
    """Rows of a micro-batch that every worker holds forward and backward beside weights, gradients and moments. CUDA
    only.

    micro_of(rows): a micro-batch of so many rows. Two passes a try, without touching weights, gradients, moments or the
    generators' state.
    """

    total = torch.cuda.get_device_properties(mesh.device).total_memory

    def fits(rows: int) -> bool:
        micro, failed = micro_of(rows), False
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(mesh.device)
        try:
            for _ in range(2):
                with precision.autocast():
                    loss = loss_of(model, placed(micro, mesh.device), objective).total
                (loss / micro["input_ids"].numel()).backward()
                del loss
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        model.zero_grad(set_to_none=True)
        gc.collect()
        used = torch.cuda.max_memory_reserved(mesh.device)
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        return mesh.largest(int(failed or used > HEADROOM * total)) == 0

    with torch.random.fork_rng(devices=[mesh.device]):
        return largest_that_fits(fits, guess, most)


class OutOfMemory(RuntimeError):
    """One of several workers ran out of memory: all start again from the last checkpoint with the smaller micro-batch
    it recorded.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. On a CPU torch has no class for it: there the system ends the process instead."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError)


def back_off(
    optimizer: torch.optim.Optimizer, mesh: Mesh, loader: Batches, run: Path, step: int, reason: str, *, updated: bool
) -> str:
    """Halve the micro-batch, for this session and later ones; returns what to tell. `updated`: the step's update had
    begun.

    Raises InputError at one row, OutOfMemory where the step cannot be tried again or other ranks must follow.
    """
    rows = loader.micro_rows
    if updated:
        raise OutOfMemory(
            f"out of memory in the middle of an update at step {step + 1} ({reason}); resume from the last checkpoint"
        )
    if rows == 1:
        raise InputError(
            f"out of memory with one row a micro-batch ({reason}); shorten data.sequence_length, "
            'or set train.activation_checkpointing = "full" or train.loss = "chunked"'
        )
    smaller = rows // 2
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    write_json(run / MICRO_ROWS_FILE, {"rows": smaller, "step": step, "reason": reason})
    note = f"out of memory at step {step + 1}: micro-batches of {smaller} rows from here, before {rows} ({reason})"
    if mesh.world_size > 1:
        raise OutOfMemory(note)
    loader.set_micro_rows(smaller)
    return note
