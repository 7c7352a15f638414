"""What is done when memory runs out in a step. Tokens of a step and their order never change, only how many rows a
forward pass holds.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from argonne.errors import InputError
from argonne.files import write_json
from argonne.parallel.mesh import Mesh
from argonne.train.data import Batches

MICRO_ROWS_FILE = "micro_rows.json"


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
