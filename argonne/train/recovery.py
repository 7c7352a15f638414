"""What is done when memory or the compiler fails in a step. Tokens of a step and their order never change, only how many rows a pass holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from argonne.errors import InputError
from argonne.files import read_json, write_json
from argonne.parallel.compile import is_compiler_error, undo_compile
from argonne.parallel.mesh import Mesh
from argonne.train.data import Batch, Batches

MICRO_ROWS_FILE = "micro_rows.json"


class OutOfMemory(RuntimeError):
    """One of several workers ran out of memory: all start again from the last checkpoint with the smaller micro-batch it recorded."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in ("can't allocate memory", "CUDA out of memory"))
    )


def recorded_micro_rows(run: Path) -> int | None:
    """The micro-batch an earlier session of the run had to back off to, None where none did."""
    path = run / MICRO_ROWS_FILE
    return int(read_json(path)["rows"]) if path.exists() else None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Recovery:
    """Turns a failed step into one that can be tried again, or raises what ends the session."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        plain: nn.Module,
        mesh: Mesh,
        loader: Batches,
        run: Path,
        tell: Callable[[int, str], None],
        *,
        compiled: bool,
    ) -> None:
        self.optimizer, self.plain, self.mesh, self.loader, self.run, self.tell = optimizer, plain, mesh, loader, run, tell
        self.compiled = compiled

    def eager(self, error: BaseException, step: int) -> bool:
        """Where the compiler failed: give up on compiling, loudly, once; True where the step can be tried again."""
        if not (self.compiled and is_compiler_error(error)):
            return False
        self.compiled = False
        undo_compile(self.plain)
        self.tell(step + 1, f"compiling failed, training goes on eagerly: {type(error).__name__}: {first_line(error)}")
        return True

    def smaller(self, batch: Batch, reason: str, *, updated: bool) -> Batch:
        """Halve the micro-batch and cut the same rows again. `updated`: an update had begun, so that the step cannot be tried again.

        Raises InputError at one row, OutOfMemory where other ranks must follow.
        """
        rows = self.loader.micro_rows
        if updated:
            raise OutOfMemory(
                f"out of memory in the middle of an update at step {batch.step + 1} ({reason}); resume from the last checkpoint"
            )
        if rows == 1:
            raise InputError(
                f"out of memory with one row a micro-batch ({reason}); shorten data.sequence_length, "
                'or set train.activation_checkpointing = "full" or train.loss = "chunked"'
            )
        smaller = rows // 2
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()
        write_json(self.run / MICRO_ROWS_FILE, {"rows": smaller, "step": batch.step, "reason": reason})
        note = f"out of memory at step {batch.step + 1}: micro-batches of {smaller} rows from here, before {rows} ({reason})"
        if self.mesh.world_size > 1:
            raise OutOfMemory(note)
        self.tell(batch.step + 1, note)
        self.loader.set_micro_rows(smaller)
        return self.loader.batch(batch.step)
