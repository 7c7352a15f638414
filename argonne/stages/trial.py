"""A few steps of a recipe on this machine, through the loop that trains: what `argonne plan --measure` tells, and what
the benchmarks time.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from argonne.config import BatchSection, Recipe
from argonne.data.loader import Batch
from argonne.errors import InputError
from argonne.model.build import build_model, config_from_fields
from argonne.operation import CheckpointSection, LogSection, ParallelSection
from argonne.parallel.compile import compile_blocks
from argonne.parallel.mesh import Mesh, choose_device
from argonne.parallel.parallelise import in_one_call
from argonne.plan import Plan, choose_setup
from argonne.plan.build import plan_of
from argonne.plan.shape import as_trained
from argonne.stages.setup import configure_model, planned_device
from argonne.stages.start import architecture_fields
from argonne.train.guard import StopWatch
from argonne.train.objectives import next_token
from argonne.train.optim import Precision, build_optimizer, resolve_precision
from argonne.train.run import RunFolder
from argonne.train.saving import Progress
from argonne.train.telemetry import MetricsLog
from argonne.train.trainer import Hooks, Trained, Trainer

MEASURED_STEPS, MOST_MICRO_BATCHES = 3, 4
TOTAL_STEPS = 1_000_000  # of a schedule that is never reached


class _Memory:
    """Data that hands out one batch again and again, and notes when each step ends: when the next
    batch is asked for.
    """

    source_names = ("memory",)
    unit, reads_model, vocab_size = "tokens", False, 0

    def __init__(
        self, ids: torch.Tensor, micro_rows: int, steps: int, warm_up: int, device: str, after_first: Callable[[], None]
    ) -> None:
        self.ids, self.micro_rows, self.steps, self.warm_up, self.device, self.after_first = (
            ids,
            micro_rows,
            steps,
            warm_up,
            device,
            after_first,
        )
        self.ends: list[float] = []

    def batch(self, step: int) -> Batch:
        """The batch of `step`, after the step before has ended. On CUDA the device is waited for only at the first and
        the last step.
        """
        if step:
            if self.device == "cuda" and step in (self.warm_up, self.warm_up + self.steps):
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            if step == self.warm_up:
                self.after_first()
            if step == self.warm_up + self.steps:
                raise _Enough
        pieces = self.ids.split(self.micro_rows)
        micro = [
            {"input_ids": piece[:, :-1].contiguous(), "shift_labels": piece[:, 1:].contiguous()} for piece in pieces
        ]
        return Batch(step, micro, self.tokens_before(1), 0.0)

    reads_alone = True

    def set_micro_rows(self, rows: int) -> None:
        raise RuntimeError("the micro-batch of a benchmark does not change")

    def tokens_before(self, step: int) -> int:
        return step * self.ids.shape[0] * (self.ids.shape[1] - 1)

    def samples_before(self, step: int) -> int:
        return step * self.ids.shape[0]

    def rows(self, step: int) -> int:
        return int(self.ids.shape[0])

    def tokens_by_source(self, step: int) -> dict[str, int]:
        return {"memory": self.tokens_before(step)}

    def passes(self, step: int) -> dict[str, float]:
        return {"memory": float(step)}

    def close(self) -> None:
        """Nothing is open."""


class _Enough(Exception):
    """The measured steps are done."""


class NotCompiled(RuntimeError):
    """The compiler failed, and the loop went on without: what was timed is not what was asked for."""


@dataclass(frozen=True)
class Trial:
    """One way to train and its speed here, 0 where it could not be compiled. hours: of the whole run, where its length
    is known. chosen: what the recipe takes here.
    """

    precision: str
    compile: str
    tokens_per_second: float
    hours: float | None
    chosen: bool


def measure(
    recipe: Recipe, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Plan, list[Trial]]:
    """The plan for one device of this machine, and the speed of each way to train on it: precisions on a CPU, compiled
    or not on a GPU. Plain rows of random tokens, whatever the stage. progress: called with (ways done, all).

    Raises InputError where the model does not fit.
    """
    device = choose_device(recipe.train.device, where="train.device")
    fit = replace(as_trained(recipe), parallel=ParallelSection())
    plan = plan_of(fit, gpu=planned_device(device), gpus=1)
    if not plan.fits:
        raise InputError(f"--measure: the model does not fit into the memory of {plan.device}; {plan.advice}")
    rows = plan.micro_rows * min(plan.micro_batches, MOST_MICRO_BATCHES)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(fit.model.vocab_size or 0), (rows, plan.sequence_length + 1), generator=draw)
    compiled = fit.train.compile == "on" or (fit.train.compile == "auto" and device.type == "cuda")
    own = (plan.precision, "on" if compiled else "off")
    ways = [(plan.precision, "on"), (plan.precision, "off")]
    if device.type != "cuda":
        ways = [own, *((precision, own[1]) for precision in ("fp32", "bf16") if precision != plan.precision)]
    trials: list[Trial] = []
    for precision, compile in ways:
        progress(len(trials), len(ways))
        tried = replace(
            fit,
            train=replace(fit.train, precision=precision, compile=compile),
            batch=BatchSection(ids.shape[0] * plan.sequence_length, micro=plan.micro_rows),
            log=LogSection(every_steps=TOTAL_STEPS, tensorboard=False),
            checkpoint=CheckpointSection(every_minutes=0.0),
        )
        speed = 0.0
        aside = contextlib.redirect_stderr(io.StringIO())
        with tempfile.TemporaryDirectory() as folder, aside, contextlib.suppress(NotCompiled):
            seconds = timed_steps(tried, ids, Path(folder), MEASURED_STEPS, device=device.type)
            speed = tried.batch.tokens_per_step / seconds
        hours = plan.tokens / speed / 3600 if plan.tokens is not None and speed else None
        trials.append(Trial(precision, compile, speed, hours, (precision, compile) == own))
    return plan, trials


def trial_lines(trials: list[Trial]) -> list[str]:
    """What `argonne plan --measure` prints behind the plan."""
    best = max(trials, key=lambda trial: trial.tokens_per_second)
    taken = next(trial for trial in trials if trial.chosen)
    threads = f", {torch.get_num_threads()} threads" if not torch.cuda.is_available() else ""
    lines = [f"measured on this machine{threads}, steps of random tokens"]
    for trial in sorted(trials, key=lambda trial: -trial.tokens_per_second):
        way = trial.precision + (", compiled" if trial.compile == "on" else "")
        time = ""
        if trial.hours is not None:
            time = f"  {trial.hours:,.1f} hours" if trial.hours >= 2 else f"  {60 * trial.hours:.1f} minutes"
        told = (
            f"{trial.tokens_per_second:>10,.0f} tokens/s{time}" if trial.tokens_per_second else "could not be compiled"
        )
        lines.append(f"  {way:<15} {told}{'  as the recipe' * trial.chosen}")
    if best is not taken and taken.tokens_per_second:
        flag = f"--train.precision {best.precision}"
        if best.compile != taken.compile:
            flag = f"--train.compile {best.compile}"
        lines.append(f"  {flag} would be {best.tokens_per_second / taken.tokens_per_second:.2f} times as fast")
    return lines


def timed_steps(
    recipe: Recipe,
    ids: torch.Tensor,
    folder: Path,
    steps: int,
    *,
    warm_up: int = 1,
    device: str = "cpu",
    after_first: Callable[[], None] = lambda: None,
) -> float:
    """Seconds a step: the median of `steps` on the CPU, their mean on CUDA, after `warm_up` steps. `ids` is (rows,
    length + 1). Raises NotCompiled where the recipe compiles and the compiler fails.
    """
    mesh = Mesh(device=torch.device(device))
    model: Any = build_model(config_from_fields(architecture_fields(recipe.model)), seed=0, device=device).train()
    configure_model(model, recipe, choose_setup(recipe, planned_device(mesh.device)))
    width = int(recipe.model.hidden_size or 0)
    precision = Precision(resolve_precision(recipe.train.precision, mesh.device, width), mesh.device)
    recipe = replace(recipe, train=replace(recipe.train, precision=precision.name))
    parallelised = in_one_call(model, model, mesh, next_token, precision)
    optimizer = build_optimizer(model, recipe.optim, mesh)
    if compiled := recipe.train.compile == "on" or (recipe.train.compile == "auto" and device == "cuda"):
        compile_blocks(model)
    data: Any = _Memory(ids, int(recipe.batch.micro), steps, warm_up, device, after_first)
    trainer = Trainer(
        recipe,
        RunFolder(folder),
        mesh,
        Trained(parallelised, optimizer, precision, compiled),
        data,
        data,
        Hooks(export=lambda model: None, checkpoint_files=lambda folder: None, state=lambda step: {}),
        metrics=MetricsLog(folder, recipe.log, enabled=False),
        watch=StopWatch(recipe.stop),
        progress=Progress(),
        total_steps=TOTAL_STEPS,
    )
    with contextlib.suppress(_Enough):
        trainer.fit()
    if compiled and not trainer.compiled:
        raise NotCompiled
    ends = data.ends[warm_up - 1 :]
    gaps = [late - early for early, late in itertools.pairwise(ends)]
    return statistics.median(gaps) if device == "cpu" else (ends[-1] - ends[0]) / steps
