"""When and how the loop saves: in place, or beside training from a copy. A failed save is told and survived; the last
good one stays.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from argonne.config import CheckpointSection
from argonne.parallel.mesh import Mesh
from argonne.train import checkpoint
from argonne.train.telemetry import MetricsLog


@dataclasses.dataclass(frozen=True)
class Best:
    """The checkpoint with the lowest held-out loss."""

    step: int
    loss: float


@dataclasses.dataclass
class Progress:
    """Where the run stands; what state.json holds beside data and config."""

    step: int = 0
    best_held_out: float | None = None
    best_step: int | None = None
    skipped: int = 0
    scaler: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> Best | None:
        found = self.best_held_out is not None and self.best_step is not None
        return Best(self.best_step, self.best_held_out) if found else None  # type: ignore[arg-type]


class Saver:
    """Writes checkpoints of one run; `blocked_seconds` is what the loop has waited for them."""

    def __init__(
        self,
        run: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        mesh: Mesh,
        keep: CheckpointSection,
        metrics: MetricsLog,
        log: Callable[[str], None],
        add_files: Callable[[Path], None],
        first_step: int,
        best: Best | None = None,
    ) -> None:
        self.run, self.model, self.optimizer, self.mesh, self.keep = run, model, optimizer, mesh, keep
        self.metrics, self.log, self.add_files = metrics, log, add_files
        self.blocked_seconds = 0.0
        self.last_step, self.last_time = first_step, time.monotonic()
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None
        self.best = best  # of the checkpoints that are on the disk
        self._writing: tuple[int, float, float, Best | None] = (first_step, 0.0, 0.0, best)
        self._copies: dict[str, torch.Tensor] = {}
        if keep.asynchronous:  # beside the first steps: fresh memory costs more than the copy into it
            tensors = checkpoint.run_tensors(model, optimizer)
            self._preparing = threading.Thread(target=self._make_copies, args=(tensors,), name="copies", daemon=True)
            self._preparing.start()

    def _make_copies(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if not isinstance(tensor, DTensor):  # of a sharded one a copy is made each time: it is a rank's part only
                self._copies[name] = torch.empty_like(tensor, device="cpu").zero_()

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        held = self._copies.get(name)
        return tensor.detach().to("cpu", copy=True) if held is None else held.copy_(tensor.detach())

    def due_by_time(self, step: int) -> bool:
        minutes = self.keep.every_minutes
        return minutes > 0 and time.monotonic() - self.last_time >= 60 * minutes and self.last_step != step

    def holds(self, step: int) -> bool:
        """Is the newest save that of `step`? Waits for one that is being written; its failure is told."""
        self.wait()
        return self.last_step == step and checkpoint.checkpoint_path(self.run, step).exists()

    def save(self, step: int, state: dict[str, Any], best: Best | None, *, final: bool = False) -> bool:
        """Save `step`; True when it is written (or, asynchronously, begun). With `final` it is complete on return and a
        failure is raised: its own, not that of a save before it.

        best: the best checkpoint once this one is on the disk; until then the one before is kept.
        """
        start = time.monotonic()
        self.wait()
        self.last_time = time.monotonic()
        try:
            checkpoint.check_finite(self.model, self.mesh)
        except checkpoint.NonFiniteWeights as error:
            self._refuse(step, error, final)
            return False
        checkpoint.check_ends(self.model, self.mesh)
        tensors = checkpoint.run_tensors(self.model, self.optimizer)
        if self.keep.asynchronous and not final:
            self._preparing.join()
            copies = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
            # In a thread, whose ranks agree on a group of their own, so that nothing mixes with the loop's agreements.
            mesh = dataclasses.replace(self.mesh, agreement=self.mesh.saving)

            def work() -> None:
                try:
                    self._write(step, copies, state, mesh)
                except BaseException as error:
                    self._problem = error

            self._writing = (step, start, time.monotonic() - start, best)
            self._thread = threading.Thread(target=work, name="checkpoint")
            self._thread.start()
            return True
        try:
            self._write(step, tensors, state, self.mesh)
        except OSError as error:
            self._refuse(step, error, final)
            return False
        self._done(step, start, time.monotonic() - start, best)
        return True

    def _write(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], mesh: Mesh) -> None:
        checkpoint.save_checkpoint(self.run, step, tensors, state, mesh, add_files=self.add_files)

    def poll(self) -> None:
        """Record a background save that has ended, without waiting for one that has not."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for a save in the background and record how it went."""
        if self._thread is None:
            return
        began = time.monotonic()
        self._thread.join()
        self._thread = None
        step, start, blocked, best = self._writing
        problem, self._problem = self._problem, None
        if problem is None:
            self._done(step, start, blocked + time.monotonic() - began, best)
        elif isinstance(problem, OSError):
            self._refuse(step, problem, False)
        else:
            raise problem

    def _done(self, step: int, start: float, blocked: float, best: Best | None) -> None:
        self.best = best
        self.blocked_seconds += blocked
        self.last_step, self.last_time = step, time.monotonic()
        path, seconds = checkpoint.checkpoint_path(self.run, step), time.monotonic() - start
        self.metrics.write(
            "checkpoint", step, path=path.name, seconds=round(seconds, 3), blocked_seconds=round(blocked, 3)
        )
        self.log(
            f"saved {path} in {seconds:.1f} s"
            + (f", {blocked:.1f} s of them in the loop's way" if self.keep.asynchronous else "")
        )
        if self.mesh.is_main:
            checkpoint.prune(self.run, self.keep, best.step if best else None, self.log)

    def _refuse(self, step: int, error: Exception, final: bool) -> None:
        self.metrics.write("warning", step, message=f"checkpoint not written: {error}")
        self.log(f"warning: no checkpoint at step {step}: {error}. The earlier ones are untouched.")
        if final:
            raise error
