"""metrics.jsonl always; TensorBoard and Weights & Biases where asked for; the line a person reads."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from argonne import layout
from argonne.config import LogSection


class MetricsLog:
    """Append-only records of a run, one JSON object a line, each written whole.

    What the disk does not take (full, gone) is kept in memory and written as soon as it does: training goes on. TensorBoard and W&B may fail
    without harm: the failure is recorded once and that writer is dropped.
    """

    def __init__(self, folder: Path, log: LogSection, *, enabled: bool = True, run_name: str = "") -> None:
        self._file: BinaryIO | None = None
        self._waiting = b""
        self._failing = False
        self._writers: dict[str, Any] = {}
        if not enabled:
            return
        self._file = open(folder / layout.METRICS, "a+b", buffering=0)  # noqa: SIM115 - open for the life of the run
        # A killed process may have left half a line: end it, so that the next record starts on its own.
        if size := self._file.seek(0, 2):
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")
        makers: dict[str, Callable[[], Any]] = {}
        if log.tensorboard:
            makers["tensorboard"] = lambda: _tensorboard(folder / layout.TENSORBOARD)
        if log.wandb:
            makers["wandb"] = lambda: _wandb(log.wandb or "", run_name, folder)
        for name, make in makers.items():
            try:
                self._writers[name] = make()
            except Exception as error:  # telemetry never stops a run
                self.write("warning", 0, message=f"{name} is off: {error}")

    def write(self, event: str, step: int, **values: Any) -> None:
        """Record `event` at `step` (completed optimizer steps)."""
        if self._file is None:
            return
        record = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        self._waiting += (json.dumps(record, ensure_ascii=False, allow_nan=True) + "\n").encode()
        self._drain()
        for name, writer in list(self._writers.items()):
            try:
                writer(event, step, values)
            except Exception as error:  # telemetry never stops a run
                del self._writers[name]
                self.write("warning", step, message=f"{name} failed and is off from here: {error}")

    def _drain(self) -> None:
        """Write what waits, as far as the disk takes it."""
        assert self._file is not None
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._failing = False
        except OSError as error:
            if not self._failing:
                print(f"warning: metrics.jsonl: {error}; records are kept and written when there is room", file=sys.stderr, flush=True)
            self._failing = True

    def close(self) -> None:
        if self._file is None:
            return
        self._drain()
        if self._waiting:
            lines = self._waiting.count(b"\n")
            print(f"warning: metrics.jsonl: the last {lines:,} records could not be written and are lost", file=sys.stderr, flush=True)
        self._file.close()


def _scalars(event: str, values: dict[str, Any]) -> dict[str, float]:
    found = {f"{event}/{name}": value for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    for source, numbers in (values.get("sources") or {}).items():
        found |= {f"{event}/{source}/{name}": value for name, value in numbers.items() if value is not None}
    return found


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise RuntimeError("tensorboard is not installed (pip install 'argonne[tensorboard]', or log.tensorboard = false)") from None
    writer = SummaryWriter(str(folder))

    def write(event: str, step: int, values: dict[str, Any]) -> None:
        for name, value in _scalars(event, values).items():
            writer.add_scalar(name, value, step)
        if event == "sample":
            writer.add_text("sample", f"{values.get('prompt', '')}{values.get('text', '')}", step)
        writer.flush()

    return write


def _wandb(project: str, name: str, folder: Path) -> Any:
    import wandb

    run = wandb.init(project=project, name=name, dir=str(folder), resume="allow", id=name)
    return lambda event, step, values: run.log({**_scalars(event, values), "step": step})


class ProgressLine:
    """A bar with rate and time left on a terminal, plain lines elsewhere; both on stderr."""

    def __init__(self, total: int, first: int, *, enabled: bool) -> None:
        self._enabled, self._bar = enabled, None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, file=sys.stderr)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def human(number: float) -> str:
    """1234567 -> 1.23M."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def human_time(seconds: float) -> str:
    """93784 -> 1d 2h; 61 -> 1m 1s."""
    seconds = int(seconds)
    parts = [(seconds // 86400, "d"), (seconds % 86400 // 3600, "h"), (seconds % 3600 // 60, "m"), (seconds % 60, "s")]
    while len(parts) > 1 and not parts[0][0]:
        parts.pop(0)
    return " ".join(f"{count}{unit}" for count, unit in parts[:2])


def step_line(record: dict[str, Any], total_steps: int, seconds_left: float) -> str:
    """The line of one logged step, for a person."""
    mfu = "n/a" if record["mfu"] is None else f"{100 * record['mfu']:.1f}%"
    return (
        f"step {record['step']:>{len(str(total_steps))}}/{total_steps}  loss {record['loss']:.4f}  lr {record['lr']:.3g}  "
        f"grad {record['grad_norm']:.3f}  {human(record['tokens_per_second'])} tok/s  mfu {mfu}  {record['memory_gb']:.2f} GB  "
        f"tokens {human(record['tokens'])}  left {human_time(seconds_left)}"
    )
