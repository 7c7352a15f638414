"""fit(): the only training loop. A stage hands it a model, data, an objective and services; the loop gives exact steps, saves and stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from argonne.config import Recipe
from argonne.parallel.apply import eager_blocks
from argonne.parallel.mesh import Mesh
from argonne.train import checkpoint, optim
from argonne.train.guard import Diverged, HangWatch, NonFinitePolicy, StopWatch, call_with_limit, parse_duration
from argonne.train.metrics import MetricsLog, ProgressLine
from argonne.train.precision import Precision
from argonne.train.profiling import start_profiler
from argonne.train.run import COMPLETE, STOPPED, RunFolder
from argonne.train.saving import Saver
from argonne.train.schedule import learning_rate
from argonne.train.step import Objective, Stepper
from argonne.train.telemetry import Telemetry


@dataclass(frozen=True)
class Services:
    """What a stage gives beside data and loss. All but `export` and `checkpoint_files` are telemetry: a failure there is recorded, never fatal."""

    export: Callable[[nn.Module, Path], None]
    checkpoint_files: Callable[[Path], None]
    held_out: Callable[[nn.Module], dict[str, Any]] | None = None
    sample: Callable[[nn.Module], str] | None = None
    banner: Callable[[nn.Module], list[str]] = lambda model: []


@dataclass
class Progress:
    """Where the run stands; what state.json holds beside data and config."""

    step: int = 0
    best_held_out: float | None = None
    best_step: int | None = None
    skipped: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a session ended: `reason` is "complete" or why it stopped."""

    step: int
    reason: str

    @property
    def complete(self) -> bool:
        return self.reason == "complete"


class Trainer:
    """One session of one run. Everything it needs is given; it opens nothing but the metrics of its own run folder."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        run: RunFolder,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Any,
        mesh: Mesh,
        objective: Objective,
        services: Services,
        metrics: MetricsLog,
        watch: StopWatch,
        total_steps: int,
        micro_rows: int,
        progress: Progress,
        state: Callable[[int], dict[str, Any]],
        compiled: bool = False,
    ) -> None:
        self.recipe, self.run, self.model, self.optimizer, self.data = recipe, run, model, optimizer, data
        self.mesh, self.services, self.watch = mesh, services, watch
        self.total_steps, self.progress, self._state = total_steps, progress, state
        self.metrics = metrics
        self.line = ProgressLine(total_steps, progress.step, enabled=mesh.is_main)
        self.telemetry = Telemetry(recipe, data, mesh, metrics, self.line, total_steps, progress.step)
        self.precision = Precision(recipe.train.precision, mesh.device, progress.scaler)
        self.policy = NonFinitePolicy(recipe.optim.max_skipped)
        self.loader = data.loader(
            mesh.rank, mesh.world_size, micro_rows, pin_memory=mesh.device.type == "cuda", broadcast=mesh.broadcast_tensor
        )
        plain = getattr(model, "module", model)
        self.saver = Saver(
            run.path, plain, optimizer, mesh, recipe.checkpoint, metrics, self.line.say, services.checkpoint_files, progress.step
        )
        self.stepper = Stepper(
            model,
            optimizer,
            objective,
            self.precision,
            mesh,
            self.loader,
            grad_clip=recipe.optim.grad_clip,
            run=run.path,
            say=self.line.say,
        )
        self.stepper.compiled = compiled
        self._measured: tuple[int, float] | None = None  # step and loss of the newest held-out evaluation
        self._telemetry_limit = parse_duration(recipe.log.telemetry_limit, "log.telemetry_limit")
        timeout = parse_duration(recipe.parallel.timeout, "parallel.timeout")
        self._hang_watch = HangWatch(run.path / f"stacks_rank_{mesh.rank}.txt", timeout if mesh.world_size > 1 else None)

    def fit(self, stop_after: int | None = None, *, profile: bool = False) -> Outcome:
        """Train to the end, or until a request to stop; always leaves a complete checkpoint behind. Raises Diverged past the non-finite limit.

        `stop_after`: end this session after that many completed steps, as a request to stop would. `profile`: write a trace of three steps.
        """
        first = self.progress.step
        self._check_first_rate(first)
        profiler = start_profiler(self.run.path, self.line.say) if profile and self.mesh.is_main else None
        try:
            upcoming = self._fetch(first) if first < self.total_steps else None
            while self.progress.step < self.total_steps and upcoming is not None:
                self._hang_watch.alive()
                batch, valid, stop, save = upcoming()
                if stop:
                    return self._stop(self.watch.reason() or "another worker was asked to stop")
                if save:
                    self._save()
                upcoming = self._step(batch, valid)
                if profiler is not None:
                    profiler.step()
                self._after_step()
                if stop_after is not None and self.progress.step >= stop_after < self.total_steps:
                    return self._stop(f"asked to stop after step {stop_after}")
            return self._finish()
        finally:
            self._hang_watch.close()
            if profiler is not None:
                profiler.stop()
            self.loader.close()
            self.line.close()

    def _check_first_rate(self, step: int) -> None:
        """The rate about to be applied is the requested curve's, whatever a restored state says."""
        if step >= self.total_steps:
            return
        expected = learning_rate(step, self.total_steps, self.recipe.optim, self.recipe.schedule)
        self._set_rate(step)
        found = optim.applied_rate(self.optimizer)
        if found != expected:
            raise RuntimeError(f"the rate of the first step is {found}, the schedule says {expected}")

    def _set_rate(self, step: int) -> float:
        rate = learning_rate(step, self.total_steps, self.recipe.optim, self.recipe.schedule)
        optim.set_learning_rate(self.optimizer, rate, self.recipe.optim.lr)
        return rate

    def _fetch(self, step: int) -> Callable[[], tuple[Any, int, bool, bool]]:
        """Take the batch of `step` and start agreeing on it: valid tokens of all ranks, whether any wants to stop, whether a save is due by time."""
        batch = self.loader.batch(step)
        self.telemetry.waited_for_data(batch.waited_seconds)
        due = self.mesh.is_main and self.saver.due_by_time(step)
        agreed = self.mesh.sum_later([batch.valid_tokens, int(self.watch.reason() is not None), int(due)])

        def wait() -> tuple[Any, int, bool, bool]:
            valid, stop, save = agreed()
            return batch, valid, bool(stop), bool(save)

        return wait

    def _step(self, batch: Any, valid: int) -> Callable[[], tuple[Any, int, bool, bool]] | None:
        """One optimizer step; returns the next batch, fetched while the device works on this one."""
        step = batch.step
        rate = self._set_rate(step)
        result = self.stepper.run_step(batch, valid, self._seed_of(step))
        upcoming = self._fetch(step + 1) if step + 1 < self.total_steps else None
        self.telemetry.observe(step + 1, result, rate, valid)
        for note in self.stepper.notes:
            self.metrics.write("warning", step + 1, message=note)
        self.stepper.notes.clear()
        self.progress.step = step + 1
        self.line.advance()
        return upcoming

    def _seed_of(self, step: int) -> int:
        """Randomness is a function of (seed, step, this rank's first sample): nothing random is stored."""
        sample = self.data.samples_before(step) + self.data.rows(step) * self.mesh.rank // self.mesh.world_size
        return (self.recipe.seed * 0x9E3779B97F4A7C15 + step * 0xC2B2AE3D27D4EB4F + sample * 0x165667B19E3779F9) % 2**63

    def _after_step(self) -> None:
        recipe, step = self.recipe, self.progress.step
        self.saver.poll()
        for where, skipped in self.telemetry.readings():
            self.policy.observe(skipped)
            if skipped:
                self.progress.skipped += 1
                self.metrics.write("skip", where, in_a_row=self.policy.in_a_row)
                self.line.say(f"warning: step {where} is skipped: its gradient is not finite ({self.policy.in_a_row} in a row)")
        if self.policy.exceeded():
            newest = checkpoint.newest_complete(self.run.path, self.line.say)
            raise Diverged(
                f"{self.policy.in_a_row} steps in a row had a non-finite gradient (optim.max_skipped = {self.policy.limit}); "
                f"the last good checkpoint is {newest.path if newest else 'none'}: resume it with a lower rate"
            )
        first_of_session = self.telemetry.first_step
        if step == first_of_session + 1:
            for text in self.services.banner(self.model):
                self.line.say(text)
        if step % recipe.log.every_steps == 0 or step in (first_of_session + 1, self.total_steps):
            self.telemetry.log(step, self.saver.blocked_seconds)
            self.run.heartbeat()
        due = recipe.eval.every_steps > 0 and step % recipe.eval.every_steps == 0
        if due and step < self.total_steps:
            self._held_out()
        if recipe.checkpoint.every_steps > 0 and step % recipe.checkpoint.every_steps == 0 and step < self.total_steps:
            self._save()

    def _held_out(self) -> None:
        if self.services.held_out is None:
            return
        found = self._telemetry_call("held_out", self.services.held_out)
        if not found:
            return
        step = self.progress.step
        self.metrics.write("held_out", step, **found)
        bits = f", {found['bits_per_byte']:.4f} bits per byte" if found.get("bits_per_byte") is not None else ""
        self.line.say(f"step {step}: held-out loss {found['loss']:.4f}{bits} ({found['tokens']:,} tokens)")
        self._measured = (step, float(found["loss"]))

    def _telemetry_call(self, name: str, function: Callable[[nn.Module], Any]) -> Any:
        """Run evaluation or sampling on the main rank, outside collectives; a failure is recorded and training goes on."""
        if not self.mesh.is_main:
            return None
        self._hang_watch.pause()
        model = getattr(self.model, "module", self.model)
        was_training = model.training
        model.eval()

        def call() -> Any:
            with torch.no_grad(), self.precision.autocast():
                return function(model)

        # Training draws its own seeds, but a user's code may not: leave the generators as they were.
        devices = [self.mesh.device] if self.mesh.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), eager_blocks(model):
            try:
                return call_with_limit(call, self._telemetry_limit)
            except Exception as error:
                self.line.say(f"warning: {name} failed and is left out at step {self.progress.step}: {type(error).__name__}: {error}")
                self.metrics.write("warning", self.progress.step, message=f"{name} failed: {type(error).__name__}: {error}")
                return None
            finally:
                model.train(was_training)
                self._hang_watch.alive()

    def _save(self, *, final: bool = False) -> None:
        """A checkpoint at the current step, and a sample of what the model writes there."""
        self._hang_watch.pause()
        step, progress = self.progress.step, self.progress
        progress.scaler = self.precision.state()
        earlier = progress.best_held_out, progress.best_step
        # The best is a checkpoint that exists: an evaluation between two saves, or before one that fails, is nobody's.
        if self._measured and self._measured[0] == step and (earlier[0] is None or self._measured[1] < earlier[0]):
            progress.best_step, progress.best_held_out = self._measured
        if self.saver.last_step == step and checkpoint.checkpoint_path(self.run.path, step).exists():
            self.saver.wait(final=final)
        elif self.saver.save(step, self._state(step), self.progress.best_step, final=final):
            self._sample()
        else:
            progress.best_held_out, progress.best_step = earlier

    def _sample(self) -> None:
        prompt = self.recipe.checkpoint.sample_prompt
        if self.services.sample is None or not prompt:
            return
        text = self._telemetry_call("sampling", self.services.sample)
        if text is not None:
            try:
                self.run.add_sample(self.progress.step, prompt, text)
            except OSError as error:
                self.line.say(f"warning: samples.md: {error}; the sample is in metrics.jsonl")
            self.metrics.write("sample", self.progress.step, prompt=prompt, text=text)
            self.line.say(f"sample: {prompt}{text}")

    def _stop(self, reason: str) -> Outcome:
        self._save(final=True)
        if self.mesh.is_main:
            self._mark(STOPPED, reason)
            self.metrics.write("stop", self.progress.step, reason=reason)
        self.mesh.barrier()
        return Outcome(self.progress.step, reason)

    def _finish(self) -> Outcome:
        self._held_out()
        self._save(final=True)
        if self.mesh.is_main:
            self.services.export(getattr(self.model, "module", self.model), self.run.path / "final_model")
            self.metrics.write("complete", self.progress.step)  # before the marker, after which no session writes anything
            self._mark(COMPLETE, "complete")
        self.mesh.barrier()
        return Outcome(self.progress.step, "complete")

    def _mark(self, name: str, reason: str) -> None:
        from argonne.recipe import to_tree
        from argonne.train.run import config_hash

        self.run.write_marker(name, step=self.progress.step, reason=reason, config_hash=config_hash(to_tree(self.recipe)))
