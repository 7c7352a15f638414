"""One optimizer step: forward and backward over micro-batches, clip, update where finite; and what is done when memory or the compiler fails."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from argonne.errors import InputError
from argonne.files import read_json, write_json
from argonne.parallel.apply import is_compiler_error, undo_compile
from argonne.parallel.mesh import Mesh
from argonne.train.precision import Precision

MicroBatch = dict[str, torch.Tensor]
MICRO_ROWS_FILE = "micro_rows.json"


@dataclass(frozen=True)
class Loss:
    """What an objective returns for one micro-batch: the loss summed over its valid tokens, and each row's where sources are told apart."""

    total: torch.Tensor
    rows: torch.Tensor | None = None


Objective = Callable[[nn.Module, MicroBatch], Loss]


@dataclass(frozen=True)
class StepResult:
    """Device tensors of one step; nothing in it has been waited for. `rows`: (row losses, source numbers, labels) of each micro-batch."""

    loss_sum: torch.Tensor
    norm: torch.Tensor
    skipped: torch.Tensor
    rows: list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]


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


class Stepper:
    """Makes steps of one model. Tokens of a step and their order never change; only how many rows a forward pass holds does."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        precision: Precision,
        mesh: Mesh,
        loader: Any,
        *,
        grad_clip: float,
        run: Path,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.precision, self.mesh, self.loader = precision, mesh, loader
        self.grad_clip, self.run, self.say = grad_clip, run, say
        self.compiled = False
        self.notes: list[str] = []
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def run_step(self, batch: Any, valid: int, seed: int) -> StepResult:
        """Train on `batch`, whose global number of valid tokens is `valid`. Out of memory: the same step again in smaller micro-batches."""
        while True:
            updates = self._updates()
            torch.manual_seed(seed)
            try:
                return self._attempt(batch, valid)
            except Exception as error:
                if is_out_of_memory(error):
                    reason = str(error).strip().splitlines()[0]
                elif self.compiled and is_compiler_error(error):
                    self._eager(error)
                    continue
                else:
                    raise
            # Outside the handler: the traceback no longer keeps the step's tensors alive.
            batch = self._back_off(batch, updates, reason)

    def _updates(self) -> torch.Tensor | None:
        """How often the optimizer has stepped, to tell afterwards whether an update had begun."""
        state: dict[str, Any] = next(iter(self.optimizer.state.values()), {})
        step = state.get("step")
        return step.clone() if isinstance(step, torch.Tensor) else None

    def _attempt(self, batch: Any, valid: int) -> StepResult:
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, rows = self._backward(batch, valid)
        self.precision.unscale(self.optimizer)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        if self.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.grad_clip, norm)
        skipped = self.precision.step(self.optimizer, norm)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss_sum, norm, skipped, rows)

    def _backward(self, batch: Any, valid: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]]:
        """Gradient of (sum over valid tokens) / (valid tokens of the whole global batch); returns this rank's loss sum and row losses.

        Data-parallel reduction averages over ranks, hence the factor of the world size.
        """
        scale = self.mesh.world_size / max(1, valid)
        total = torch.zeros((), device=self.mesh.device, dtype=torch.float32)
        rows = []
        last = len(batch.micro_batches) - 1
        for index, cpu_batch in enumerate(batch.micro_batches):
            micro = {name: self._placed(name, tensor) for name, tensor in cpu_batch.items()}
            with self._gradient_sync(index == last):
                with self.precision.autocast():
                    loss = self.objective(self.model, micro)
                self.precision.scale(loss.total * scale).backward()
            total += loss.total.detach()
            rows.append((loss.rows, batch.sources[index], micro["shift_labels"]))
        return total, rows

    def _placed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A batch tensor where the model wants it: positions stay on the host, whose documents the model reads without waiting for a device."""
        return tensor if name == "position_ids" else tensor.to(self.mesh.device, non_blocking=True)

    def _gradient_sync(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        no_sync = getattr(self.model, "no_sync", None)
        return contextlib.nullcontext() if wanted or no_sync is None else no_sync()

    def _back_off(self, batch: Any, updates: torch.Tensor | None, reason: str) -> Any:
        """Halve the micro-batch and cut the same rows again. Raises InputError at one row, OutOfMemory where other ranks must follow."""
        rows = self.loader.micro_rows
        now = self._updates()
        if updates is not None and now is not None and not torch.equal(updates, now):
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
        self.say(f"warning: {note}")
        self.notes.append(note)
        self.loader.set_micro_rows(smaller)
        return self.loader.batch(batch.step)

    def _eager(self, error: Exception) -> None:
        """Give up on compiling, loudly, once."""
        self.compiled = False
        undo_compile(self.model)
        note = f"compiling failed, training goes on eagerly: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        self.say(f"warning: {note}")
        self.notes.append(note)


def next_token(model: nn.Module, micro: MicroBatch) -> Loss:
    """Cross-entropy of the next token, summed over the labels that are not -100."""
    return Loss(model(**micro, use_cache=False, loss_reduction="sum").loss)


def next_token_by_row(model: nn.Module, micro: MicroBatch) -> Loss:
    """The same, with each row's share: for runs that report the loss of each source."""
    output = model(**micro, use_cache=False, loss_reduction="sum", return_token_log_probs=True)
    return Loss(output.loss, -output.token_log_probs.detach().sum(dim=1))
