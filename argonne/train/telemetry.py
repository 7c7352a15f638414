"""What the loop observes, read when it is due, and where it goes: metrics.jsonl always, TensorBoard, W&B and trackio
where asked for, a line to read.

Nothing here makes a training step wait for the device.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from argonne import layout
from argonne.config import LogSection, Recipe
from argonne.errors import first_line
from argonne.files import human, json_text
from argonne.parallel.mesh import Mesh
from argonne.parallel.parallelise import Sums
from argonne.plan import device_peak_flops, flops_per_token
from argonne.train.data import Data
from argonne.train.guard import SpikeWatch

if TYPE_CHECKING:
    from argonne.train.writers import Writer


@dataclass(frozen=True)
class StepResult:
    """What one step left: tensors on the device, none of them waited for, its rate, and the global count that its loss
    is divided by.
    """

    sums: Sums
    norm: torch.Tensor
    skipped: torch.Tensor
    rate: float
    count: int


class _Reading:
    """Loss, norm and skip flag of one step, on their way from the device to the host."""

    def __init__(self, step: int, values: torch.Tensor, rate: float, count: int) -> None:
        self.step, self.rate, self.count = step, rate, count
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event: Any = torch.cuda.Event()
            self._event.record()
        else:
            self._host, self._event = values, None

    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def values(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class Telemetry:
    """Collects step readings and turns them into metrics records and log lines."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        mesh: Mesh,
        metrics: MetricsLog,
        line: ProgressBar,
        total_steps: int,
        first_step: int,
    ) -> None:
        self.recipe, self.data, self.mesh, self.metrics, self.line = recipe, data, mesh, metrics, line
        self.total_steps, self.first_step = total_steps, first_step
        self._pending: deque[_Reading] = deque()
        self._last: _Reading | None = None
        self._wait_data = 0.0
        self._spikes = SpikeWatch()
        # (tokens, seconds) when the session's first batch was there, and at the last record.
        self._begun = self._recorded = (0, 0.0)
        name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
        peak = device_peak_flops(name, recipe.train.precision)
        flops = flops_per_token(recipe.model, recipe.data.sequence_length)
        # The MFU of a token a second; None where the device's peak is not known.
        self._use = flops / (peak * mesh.world_size) if peak else None
        self._metrics: dict[str, torch.Tensor] = {}
        wide = torch.float32 if mesh.device.type == "mps" else torch.float64
        self._source_loss = torch.zeros(len(data.source_names), device=mesh.device, dtype=wide)
        self._source_count = torch.zeros_like(self._source_loss)

    def waited_for_data(self, seconds: float) -> None:
        self._wait_data += seconds
        if not self._begun[1]:
            self._begun = self._recorded = (self.data.tokens_before(self.first_step), time.monotonic())

    def observe(self, step: int, result: StepResult) -> None:
        """Take in what completed step `step` left on the device, without waiting for it."""
        loss = result.sums.total
        values = torch.stack([loss, result.norm.to(loss.dtype), result.skipped.to(loss.dtype)])
        for rows, micro in result.sums.rows:
            index = micro["source"]
            kept = index >= 0
            index = index.clamp_min(0)
            self._source_loss.index_add_(0, index, torch.where(kept, rows, 0).to(self._source_loss.dtype))
            self._source_count.index_add_(0, index, micro[self.data.unit].to(self._source_count.dtype) * kept)
        for name, pair in result.sums.metrics.items():
            self._metrics[name] = self._metrics[name] + pair if name in self._metrics else pair
        self._last = _Reading(step, values, result.rate, result.count)
        self._pending.append(self._last)

    def readings(self) -> list[tuple[int, bool]]:
        """(step, skipped) of the steps whose readings have arrived since the last call, in order. Tells of a loss spike
        on the way.
        """
        found = []
        while self._pending and (self._pending[0].ready() or len(self._pending) > 16):
            reading = self._pending.popleft()
            loss, _, skipped = reading.values()
            found.append((reading.step, skipped > 0))
            # Of this rank's rows: the others' are not waited for.
            about = loss * self.mesh.data_size / max(1, reading.count)
            if usual := self._spikes.observe(about):
                step = reading.step
                before, after = self.data.tokens_by_source(step - 1), self.data.tokens_by_source(step)
                read = [name for name in self.data.source_names if after[name] > before[name]]
                message = f"loss spike: {about:.4f} at step {step}, lately {usual:.4f}; read from {', '.join(read)}"
                self.metrics.warn(step, message, loss=about, usual=usual, sources=read)
        return found

    def log_step(self, step: int, save_seconds: float) -> dict[str, Any]:
        """Write the record of `step`, and return it: its own loss, norm and rate (so that a resumed run writes the
        same), and the speed since the record before it beside the session's mean.
        """
        reading = self._last
        if reading is None or reading.step != step:
            raise RuntimeError(f"no reading of step {step}")
        loss_sum, norm, _ = reading.values()
        mine = torch.stack([self._source_loss, self._source_count]).tolist()
        gathered = self.mesh.gather((loss_sum, mine, {name: pair.tolist() for name, pair in self._metrics.items()}))
        loss = sum(part[0] for part in gathered) / max(1, reading.count)
        sources = self._sources(step, [part[1] for part in gathered])
        now = (self.data.tokens_before(step), time.monotonic())
        speed, mean = _speed(self._recorded, now), _speed(self._begun, now)
        self._recorded = now
        if self.mesh.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.mesh.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        record = {
            "tokens": now[0],
            "loss": loss,
            "lr": reading.rate,
            "grad_norm": norm,
            "tokens_per_second": round(speed, 1),
            "tokens_per_second_mean": round(mean, 1),
            "mfu": self._use and speed * self._use,
            "mfu_mean": self._use and mean * self._use,
            "memory_gb": round(memory / 1e9, 4),  # the peak of this process: allocated on a GPU, resident on the CPU
            "wait_data_seconds": round(self._wait_data, 4),
            "wait_save_seconds": round(save_seconds, 4),
            "sources": sources,
        }
        if metrics := _means([part[2] for part in gathered]):
            record["metrics"] = metrics
        self._metrics.clear()
        self.metrics.write("step", step, **record)
        left = (now[1] - self._begun[1]) / max(1, step - self.first_step) * (self.total_steps - step)
        columns = shutil.get_terminal_size().columns if self.line.on_terminal else None
        self.line.log(step_line({"step": step, **record}, self.total_steps, left, columns))
        return record

    def _sources(self, step: int, parts: list[list[list[float]]]) -> dict[str, dict[str, float | None]]:
        """Tokens and passes of each source up to `step`, and its loss since the last record (null for a single source:
        it is the loss).
        """
        losses, counts = ([sum(column) for column in zip(*part, strict=True)] for part in zip(*parts, strict=True))
        self._source_loss.zero_()
        self._source_count.zero_()
        tokens, passes = self.data.tokens_by_source(step), self.data.passes(step)
        means = [loss / count if count else None for loss, count in zip(losses, counts, strict=True)]
        return {
            name: {"tokens": tokens[name], "passes": passes[name], "loss": mean}
            for name, mean in zip(self.data.source_names, means, strict=True)
        }


def _speed(early: tuple[int, float], late: tuple[int, float]) -> float:
    """Tokens a second between two (tokens, seconds)."""
    return (late[0] - early[0]) / (late[1] - early[1]) if late[1] > early[1] else 0.0


def _means(parts: list[dict[str, list[float]]]) -> dict[str, float | None]:
    """Metrics by name over all ranks: the sum of the sums by the sum of the counts, null where nothing was counted."""
    names = dict.fromkeys(name for part in parts for name in part)
    totals = {name: [sum(part[name][place] for part in parts if name in part) for place in (0, 1)] for name in names}
    return {name: value / count if count else None for name, (value, count) in totals.items()}


class MetricsLog:
    """Append-only records of a run, one JSON object a line, each written whole.

    What the disk does not take (full, gone) is kept in memory and written as soon as it does: training goes on.
    TensorBoard, W&B and trackio may fail without harm: the failure is told once and that writer is dropped. tell:
    prints a line for a person.
    """

    def __init__(self, folder: Path, log: LogSection, *, enabled: bool = True) -> None:
        self.folder, self.log = folder, log
        self.tell: Callable[[str], None] = partial(print, file=sys.stderr, flush=True)
        self._file: BinaryIO | None = None
        self._waiting, self._failing, self._step = b"", False, 0
        self._writers: dict[str, Writer] = {}
        if not enabled:
            return
        self._file = open(folder / layout.METRICS, "a+b", buffering=0)  # noqa: SIM115 - open for the life of the run
        # A killed process may have left half a line: end it, so that the next record starts on its own.
        if size := self._file.seek(0, 2):
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def begin(self, event: str, step: int, recipe: dict[str, Any], run_id: str, **values: Any) -> None:
        """Record that a session starts or resumes at `step`; open the other places that the recipe asks for."""
        if self._file is None:
            return
        log, failures, makers = self.log, [], {}
        if log.tensorboard or log.wandb or log.trackio:
            from argonne.train.writers import makers_of

            makers = makers_of(log, self.folder, step, run_id, recipe)
        for kind, make in makers.items():
            try:
                self._writers[kind] = make()
            except ImportError as error:
                if error.name != "tensorboard":  # it is written where it is installed
                    failures.append(f"{kind} is off: {error}; pip install 'argonne[{kind}]', or turn log.{kind} off")
            except Exception as error:  # telemetry never stops a run
                failures.append(f"{kind} is off: {first_line(error)}")
        self.write(event, step, **values)
        for message in failures:
            self.warn(step, message)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Record `event` at `step` (completed optimizer steps)."""
        if self._file is None:
            return
        self._step = step
        record = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        self._waiting += (json_text(record) + "\n").encode()
        self._drain()
        for name in list(self._writers):
            self._asked(name, lambda writer: writer.write(event, step, values))

    def warn(self, step: int, message: str, **values: Any) -> None:
        """To the person and into the record."""
        self.tell(f"warning: {message}")
        self.write("warning", step, message=message, **values)

    def _asked(self, name: str, work: Callable[[Writer], Any]) -> None:
        """Let a writer work that was not dropped yet; one that fails is."""
        try:
            if name in self._writers:
                work(self._writers[name])
        except Exception as error:  # telemetry never stops a run
            del self._writers[name]
            self.warn(self._step, f"{name} failed and is off from here: {first_line(error)}")

    def _drain(self) -> None:
        """Write what waits, as far as the disk takes it."""
        assert self._file is not None
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._failing = False
        except OSError as error:
            if not self._failing:
                self.tell(f"warning: metrics.jsonl: {error}; records are kept and written when there is room")
            self._failing = True

    def close(self) -> None:
        if self._file is None:
            return
        for name in list(self._writers):
            self._asked(name, lambda writer: writer.close())
        self._drain()
        if self._waiting:
            lines = self._waiting.count(b"\n")
            self.tell(f"warning: metrics.jsonl: the last {lines:,} records could not be written and are lost")
        self._file.close()


class ProgressBar:
    """A bar with rate and time left on a terminal, plain lines elsewhere; both on stderr."""

    def __init__(self, total: int, first: int, *, enabled: bool) -> None:
        self._enabled, self._bar = enabled, None
        self.on_terminal = enabled and sys.stderr.isatty()
        if self.on_terminal:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, file=sys.stderr)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def log(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def human_time(seconds: float) -> str:
    """93784 -> 1d 2h; 61 -> 1m 1s."""
    seconds = int(seconds)
    parts = [(seconds // 86400, "d"), (seconds % 86400 // 3600, "h"), (seconds % 3600 // 60, "m"), (seconds % 60, "s")]
    while len(parts) > 1 and not parts[0][0]:
        parts.pop(0)
    return " ".join(f"{count}{unit}" for count, unit in parts[:2])


def step_line(record: dict[str, Any], total_steps: int, seconds_left: float, columns: int | None = None) -> str:
    """The line of one logged step, for a person. On a terminal of so many columns what matters least is left out until
    the line fits, and the loss is bold unless NO_COLOR is set.
    """
    loss = f"{record['loss']:.4f}"
    parts = {
        "step": f"step {record['step']:>{len(str(total_steps))}}/{total_steps}",
        "loss": f"  loss {loss}",
        "lr": f"  lr {record['lr']:.3g}",
        "grad": f"  grad {record['grad_norm']:.3f}",
        "speed": f"  {human(record['tokens_per_second'])} tok/s",
        "mean": f" (mean {human(record['tokens_per_second_mean'])})",
        "mfu": f"  mfu {'n/a' if record['mfu'] is None else format(record['mfu'], '.1%')}",
        "memory": f"  {record['memory_gb']:.2f} GB",
        "tokens": f"  tokens {human(record['tokens'])}",
        "left": f"  left {human_time(seconds_left)}",
        "metrics": in_line(record.get("metrics")),
    }
    if columns is not None:
        for name in (
            "mean",
            "memory",
            "mfu" if record["mfu"] is None else "",
            "tokens",
            "mfu",
            "lr",
            "grad",
            "metrics",
        ):
            if sum(map(len, parts.values())) >= columns:  # a line as wide as the terminal wraps on some
                parts.pop(name, None)
        if not os.environ.get("NO_COLOR"):
            parts["loss"] = f"  loss \033[1m{loss}\033[0m"
    return "".join(parts.values())


def in_line(metrics: dict[str, float | None] | None) -> str:
    """Those whose names have no parts, for a person."""
    shown = {name: value for name, value in (metrics or {}).items() if "/" not in name and value is not None}
    return "".join(f"  {name} {value:.4g}" for name, value in shown.items())
