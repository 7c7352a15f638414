"""fit(): the only training loop. A stage hands it a model, data and an objective; the loop gives exact steps, saves and
stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from argonne.config import Recipe
from argonne.errors import Diverged, InputError, Stopped, TextEnds, first_line
from argonne.files import fingerprint
from argonne.parallel.compile import is_compiler_error, undo_compile
from argonne.parallel.mesh import Mesh
from argonne.parallel.parallelise import Parallelised
from argonne.recipe import to_tree
from argonne.train import checkpoint
from argonne.train.aside import LeftBehind, Sampled, Work, beside
from argonne.train.data import Batch, Batches, Data, Upcoming
from argonne.train.guard import HangWatch, NonFinitePolicy, StopWatch, parse_duration
from argonne.train.micro_batch import back_off, is_out_of_memory
from argonne.train.optim import Precision
from argonne.train.profiling import start_profiler
from argonne.train.run import COMPLETE, STOPPED, RunFolder
from argonne.train.saving import Best, Progress, Saver
from argonne.train.schedule import applied_rate, learning_rate, set_learning_rate
from argonne.train.telemetry import MetricsLog, ProgressBar, StepResult, Telemetry, in_line

Result = TypeVar("Result")


@dataclass(frozen=True)
class Trained:
    """What is trained and with what, made in the one right order: weights, parallelise, optimizer, restore, compile."""

    parallelised: Parallelised
    optimizer: torch.optim.Optimizer
    precision: Precision
    compiled: bool = False


@dataclass(frozen=True)
class Hooks:
    """What a stage gives beside data and loss. All but `export`, `checkpoint_files` and `state` are telemetry: a
    failure is recorded, never fatal.

    state(step): what state.json holds. held_out, samples by name: work that yields between forward passes, on the plain
    model in eval mode. before_first_step: they are asked then too, since the run starts from weights.
    judge(step, record of a logged step): a warning.
    """

    export: Callable[[Parallelised], None]
    checkpoint_files: Callable[[Path], None]
    state: Callable[[int], dict[str, Any]]
    held_out: Callable[[Parallelised], Work[dict[str, Any]]] | None = None
    samples: Mapping[str, Callable[[nn.Module], Work[Sampled]]] = field(default_factory=dict)
    before_first_step: bool = False
    judge: Callable[[int, dict[str, Any]], str | None] = lambda step, record: None
    banner: Callable[[nn.Module], list[str]] = lambda model: []


@dataclass(frozen=True)
class Outcome:
    """How a session ended: `reason` is "complete" or why it stopped."""

    step: int
    reason: str

    @property
    def complete(self) -> bool:
        return self.reason == "complete"


def take_step(trained: Trained, batch: Batch, count: int, rate: float, *, grad_clip: float) -> StepResult:
    """Forward and backward over the micro-batches, clip by the global norm, update where the gradient is finite.
    Nothing waits for the device.

    count: what the loss of the global batch is divided by. rate: the learning rate that is set already, for the record.
    """
    model, optimizer, precision = trained.parallelised, trained.optimizer, trained.precision
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    sums = model.forward_backward(batch.micro_batches, count)
    precision.unscale(optimizer)
    norm = model.gradient_norm(parameters)
    if grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    skipped = precision.step(optimizer, norm)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(sums, norm, skipped, rate, count)


class Trainer:
    """One session of one run. Everything it needs is given; it opens nothing but the metrics of its own run folder."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        mesh: Mesh,
        trained: Trained,
        data: Data,
        loader: Batches,
        hooks: Hooks,
        *,
        metrics: MetricsLog,
        watch: StopWatch,
        progress: Progress,
        total_steps: int,
    ) -> None:
        self.recipe, self.run, self.mesh, self.data, self.loader, self.hooks = recipe, run, mesh, data, loader, hooks
        self.trained, self.parallelised, self.optimizer = trained, trained.parallelised, trained.optimizer
        self.metrics, self.watch, self.progress, self.total_steps = metrics, watch, progress, total_steps
        self.line = ProgressBar(total_steps, progress.step, enabled=mesh.is_main)
        metrics.tell = self.line.log
        self.telemetry = Telemetry(recipe, data, mesh, metrics, self.line, total_steps, progress.step)
        self.policy = NonFinitePolicy(recipe.optim.max_skipped)
        self.saver = Saver(
            *(run.path, self.parallelised.plain, self.optimizer, mesh, recipe.checkpoint, metrics, self.line.log),
            *(hooks.checkpoint_files, progress.step, progress.best),
        )
        self.compiled = trained.compiled
        self._measured: Best | None = None  # the newest held-out evaluation
        self._telemetry_limit = parse_duration(recipe.log.telemetry_limit, "log.telemetry_limit")
        timeout = parse_duration(recipe.parallel.timeout, "parallel.timeout")
        self._hang_watch = HangWatch(
            run.path / f"stacks_rank_{mesh.rank}.txt", timeout if mesh.world_size > 1 else None
        )

    def fit(self, stop_after: int | None = None, *, profile: bool = False) -> Outcome:
        """Train to the end, or until a request to stop; always leaves a complete checkpoint behind. Raises Diverged
        past the non-finite limit.

        `stop_after`: end this session after that many completed steps, as a request to stop would. `profile`: write a
        trace of three steps.
        """
        if (step := self.progress.step) < self.total_steps:
            # The rate about to be applied is the requested curve's, whatever a restored state says.
            expected = learning_rate(step, self.total_steps, self.recipe.optim, self.recipe.schedule)
            set_learning_rate(self.optimizer, expected, self.recipe.optim.lr)
            if (found := applied_rate(self.optimizer)) != expected:
                raise RuntimeError(f"the rate of the first step is {found}, the schedule says {expected}")
        profiler = start_profiler(self.run.path, self.line.log) if profile and self.mesh.is_main else None
        try:
            if step == 0 and self.hooks.before_first_step:
                self._held_out()
                self._sample()
            agreed = self._fetch(self.progress.step)
            while agreed is not None:
                self._hang_watch.alive()
                upcoming = agreed()
                if upcoming.stop or upcoming.batch is None:
                    return self._end(self.watch.reason() or "another worker was asked to stop")
                if upcoming.save:
                    self._save()
                agreed = self._train_step(upcoming.batch, upcoming.count)
                if profiler is not None:
                    profiler.step()
                self._after_step()
                if stop_after is not None and self.progress.step >= stop_after < self.total_steps:
                    return self._end(f"asked to stop after step {stop_after}")
            self._end_together(self.loader.wrong())
            self._held_out()
            return self._end("complete")
        finally:
            self._hang_watch.close()
            if profiler is not None:
                profiler.stop()
            self.loader.close()
            self.line.close()

    def _fetch(self, step: int) -> Callable[[], Upcoming] | None:
        """Take the batch of `step` and start agreeing on it; None past the last. Ranks of the same rows count once."""
        if step >= self.total_steps:
            return None
        batch: Batch | None = None
        wrong: InputError | None = None
        try:  # at a request nothing is waited for, such as text that is still being tokenised
            with suppress(Stopped), self.watch.interrupting() if self.loader.reads_alone else nullcontext():
                batch = self.loader.batch(step)
                self.telemetry.waited_for_data(batch.waited_seconds)
        except InputError as error:
            wrong = error
        mine = batch.count if batch is not None and self.mesh.speaks_for_its_rows else 0
        due = self.mesh.is_main and self.saver.due_by_time(step)
        agreed = self.mesh.sum_later([mine, int(self.watch.reason() is not None), int(due), int(wrong is not None)])

        def wait() -> Upcoming:
            count, stop, save, ends = agreed()
            if ends:
                self._end_together(wrong)
            return Upcoming(batch, count, bool(stop), bool(save))

        return wait

    def _end_together(self, wrong: InputError | None) -> None:
        """Raise on all ranks what any of them found wrong with the input; after a save, where what was read is fine."""
        for found in self.mesh.gather(wrong):
            if isinstance(found, TextEnds) and self.progress.step:
                self._save(final=True)
            if found is not None:
                raise found

    def _train_step(self, batch: Batch, count: int) -> Callable[[], Upcoming] | None:
        """One optimizer step on `batch`, whose global count is `count`; returns the next batch, fetched while the
        device works on this one.
        """
        step = batch.step
        rate = learning_rate(step, self.total_steps, self.recipe.optim, self.recipe.schedule)
        set_learning_rate(self.optimizer, rate, self.recipe.optim.lr)
        updates = self._updates()
        while True:
            torch.manual_seed(self._seed_of(step))
            try:
                result = take_step(self.trained, batch, count, rate, grad_clip=self.recipe.optim.grad_clip)
                break
            except Exception as error:
                if self.compiled and is_compiler_error(error):  # give up on compiling, loudly, once
                    self.compiled = False
                    undo_compile(self.parallelised.plain)
                    told = f"compiling failed, training goes on eagerly: {type(error).__name__}: {first_line(error)}"
                    self.metrics.warn(step + 1, told)
                    continue
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Outside the handler: the traceback no longer keeps the step's tensors alive.
            now = self._updates()
            updated = updates is not None and now is not None and not torch.equal(updates, now)
            self.metrics.warn(
                step + 1, back_off(self.optimizer, self.mesh, self.loader, self.run.path, step, reason, updated=updated)
            )
            batch = self.loader.batch(step)
        upcoming = self._fetch(step + 1)
        self.telemetry.observe(step + 1, result)
        self.progress.step = step + 1
        self.line.advance()
        return upcoming

    def _updates(self) -> torch.Tensor | None:
        """How often the optimizer has stepped, to tell after a failure whether an update had begun. On the device:
        nothing waits for it.
        """
        state: dict[str, Any] = next(iter(self.optimizer.state.values()), {})
        step = state.get("step")
        return step.clone() if isinstance(step, torch.Tensor) else None

    def _seed_of(self, step: int) -> int:
        """Randomness is a function of (seed, step, this rank's first sample, its place among the ranks of its rows, of
        which each drops out its own tokens, heads or layers): nothing random is stored.
        """
        sample = self.data.samples_before(step) + self.data.rows(step) * self.mesh.data_rank // self.mesh.data_size
        mixed = self.recipe.seed * 0x9E3779B97F4A7C15 + step * 0xC2B2AE3D27D4EB4F + sample * 0x165667B19E3779F9
        place = self.mesh.rank % self.mesh.inner
        return (mixed + place * 0x27D4EB2F165667C5 + self.mesh.stage * 0x85EBCA77C2B2AE63) % 2**63

    def _after_step(self) -> None:
        recipe, step = self.recipe, self.progress.step
        self.saver.poll()
        for where, skipped in self.telemetry.readings():
            self.policy.observe(skipped)
            if skipped:
                self.progress.skipped += 1
                self.metrics.write("skip", where, in_a_row=self.policy.in_a_row)
                self.line.log(
                    f"warning: step {where} is skipped: its gradient is not finite ({self.policy.in_a_row} in a row)"
                )
        if self.policy.exceeded():
            first_bad = where - self.policy.in_a_row + 1
            good = checkpoint.newest_complete(self.run.path, self.line.log, before=first_bad)
            go_on = f"--rewind {good.step} goes back to it" if good else "start again"
            raise Diverged(
                f"{self.policy.in_a_row} steps in a row from step {first_bad} on had a non-finite gradient "
                f"(optim.max_skipped = {self.policy.limit}); the newest checkpoint before them is "
                f"{good.path if good else 'none'}: {go_on}, with a lower rate or other data"
            )
        if step == self.telemetry.first_step + 1:
            for text in self.hooks.banner(self.parallelised.plain):
                self.line.log(text)
        if step % recipe.log.every_steps == 0 or step in (self.telemetry.first_step + 1, self.total_steps):
            record = self.telemetry.log_step(step, self.saver.blocked_seconds)
            if told := self.hooks.judge(step, record):
                self.metrics.warn(step, told)
        if step == self.total_steps:
            return
        evaluate, save = (
            every > 0 and step % every == 0 for every in (recipe.eval.every_steps, recipe.checkpoint.every_steps)
        )
        if evaluate:
            self._held_out()
            if recipe.checkpoint.keep_best and not save:  # only the main rank may know the loss
                save = bool(self.mesh.largest(int(self._new_best() is not None)))
        if save:
            self._save()

    def _held_out(self) -> None:
        hook = self.hooks.held_out
        if hook is None:
            return
        found = self._aside("held_out", lambda: hook(self.parallelised), together=self.parallelised.forward != "alone")
        if not found:
            return
        step = self.progress.step
        self.metrics.write("held_out", step, **found)
        bits = f", {found['bits_per_byte']:.4f} bits per byte" if found.get("bits_per_byte") is not None else ""
        self.line.log(
            f"step {step}: held-out loss {found['loss']:.4f}{bits} ({found[self.data.unit]:,} {self.data.unit})"
            f"{in_line(found.get('metrics'))}"
        )
        self._measured = Best(step, float(found["loss"]))

    def _aside(self, name: str, make: Callable[[], Work[Result]], *, together: bool) -> Result | None:
        """Evaluation or sampling: on the main rank alone, outside collectives, or by all ranks in step. None where it
        was given up.
        """
        if not together and not self.mesh.is_main:
            return None
        self._hang_watch.pause()
        try:
            return beside(
                make,
                self.parallelised.plain,
                self.mesh,
                self.watch,
                self._telemetry_limit,
                together=together,
                autocast=self.trained.precision.autocast,
            )
        except LeftBehind as reason:
            self.metrics.warn(self.progress.step, f"{name} is left out: {reason}")
        except Exception as error:
            self.metrics.warn(self.progress.step, f"{name} failed: {type(error).__name__}: {error}")
        finally:
            self._hang_watch.alive()
        return None

    def _save(self, *, final: bool = False) -> None:
        """A checkpoint at the current step, and a sample of what the model writes there."""
        self._hang_watch.pause()
        step, progress = self.progress.step, self.progress
        if self.saver.holds(step):
            return
        progress.scaler = self.trained.precision.state()
        best = self._new_best() or self.saver.best
        progress.best_step, progress.best_held_out = (best.step, best.loss) if best else (None, None)
        if self.saver.save(step, self.hooks.state(step), best, final=final):
            self._sample()

    def _new_best(self) -> Best | None:
        """This step, where it was just measured and is better than every checkpoint that is on the disk."""
        found, known = self._measured, self.saver.best
        if found is None or found.step != self.progress.step or not math.isfinite(found.loss):
            return None
        return found if known is None or found.loss < known.loss else None

    def _sample(self) -> None:
        forward, plain = self.parallelised.forward, self.parallelised.plain
        if forward == "never" and self.hooks.samples:
            self.saver.wait()  # what is saved is what writes
        for name, hook in self.hooks.samples.items():
            found = self._aside(name, partial(hook, plain), together=forward == "together")
            if found is not None and self.mesh.is_main:
                try:
                    self.run.add_sample(self.progress.step, found.page)
                except OSError as error:
                    self.line.log(f"warning: samples.md: {error}; the sample is in metrics.jsonl")
                self.metrics.write(found.event, self.progress.step, **found.values)
                self.line.log(found.line)

    def _end(self, reason: str) -> Outcome:
        """Leave a complete checkpoint, and say why the session ends: "complete", or what asked it to stop."""
        step, complete = self.progress.step, reason == "complete"
        try:
            self._save(final=True)
        except (OSError, checkpoint.NonFiniteWeights) as error:
            if complete:
                raise
            raise Stopped(f"asked to stop ({reason}), but the last save failed: {error}") from error
        if self.mesh.is_main:
            if complete:
                self.hooks.export(self.parallelised)
                self.metrics.write("complete", step)  # before the marker, after which no session writes anything
            else:
                self.metrics.write("stop", step, reason=reason)
            found = fingerprint(to_tree(self.recipe))[:16]
            self.run.write_marker(COMPLETE if complete else STOPPED, step=step, reason=reason, config_hash=found)
        self.mesh.barrier()
        return Outcome(step, reason)
