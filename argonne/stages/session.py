"""One session of a training run: join the workers, own the run, find where it starts, hand everything to the loop. Every stage uses it."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from argonne.config import Recipe
from argonne.errors import InputError, Stopped
from argonne.files import write_json
from argonne.legacy.training import restore
from argonne.model.build import check_attention
from argonne.parallel.apply import compile_blocks, replicate
from argonne.parallel.launch import let_the_cause_speak_first, run_workers, worker_count
from argonne.parallel.mesh import Mesh, open_mesh
from argonne.recipe import differences, to_tree
from argonne.stages import services as service_makers
from argonne.stages.record import record_start, run_state
from argonne.stages.sizing import choose, choose_micro_rows, configure_model, plan_of, steps_of
from argonne.stages.stage import Data, Stage
from argonne.stages.start import Start, build_weights, check_tokenizer, find_start, fit_model_section
from argonne.train.allocator import return_freed_memory, returns_memory
from argonne.train.checkpoint import LAST, STATE, clean_leftovers, load_tensors, read_state, run_tensors
from argonne.train.guard import StopWatch, parse_duration
from argonne.train.metrics import MetricsLog
from argonne.train.optim import build_optimizer
from argonne.train.precision import compute_dtype
from argonne.train.run import COMPLETE, RunFolder
from argonne.train.schedule import check_schedule
from argonne.train.trainer import Outcome, Progress, Trainer

# Keys that cannot change what is trained: they may differ on resume, and are listed.
FREE_KEYS = (
    "log.", "stop.", "parallel.", "checkpoint.", "eval.", "batch.micro", "train.threads", "train.compile", "train.activation_checkpointing",
    "train.checkpointing_stride", "train.loss", "train.loss_chunk", "train.return_memory", "data.reader", "data.verify", "data.prefetch",
)  # fmt: skip


@dataclass(frozen=True)
class Session:
    """What a training verb was asked to do."""

    recipe: Recipe
    folder: Path
    stage: Stage
    resume_from: Path | None = None
    allow: frozenset[str] = frozenset()
    stop_after_step: int | None = None
    started: float | None = None
    profile: bool = False
    data_from_start: bool = False


def run_session(session: Session) -> Outcome:
    """Run one session to its end, on local workers of its own where the recipe or the GPUs of this machine ask for several."""

    parallel = session.recipe.parallel
    count = worker_count(parallel.nproc, session.recipe.train.device)
    if count == 1:
        return train_session(session)
    grace = parse_duration(session.recipe.stop.grace, "stop.grace")
    found = run_workers(
        _work, (session,), count=count, max_restarts=parallel.max_restarts, grace_seconds=grace, name=session.folder.name or "run"
    )
    if isinstance(found, InputError):
        raise found
    outcome: Outcome = found
    return outcome


def _work(session: Session) -> Outcome | InputError:
    """One worker's part. Wrong input is a result, not a failure: it is the same on every try."""

    try:
        return train_session(session)
    except InputError as error:
        return error
    except RuntimeError as error:
        let_the_cause_speak_first(error)
        raise


def train_session(session: Session) -> Outcome:
    """This process's part of a session. Raises InputError for wrong input before any work is done."""

    watch = StopWatch(session.recipe.stop, started=session.started)
    run = RunFolder(session.folder)
    timeout = parse_duration(session.recipe.parallel.timeout, "parallel.timeout")
    for text, where in ((session.recipe.stop.grace, "stop.grace"), (session.recipe.log.telemetry_limit, "log.telemetry_limit")):
        parse_duration(text, where)  # used later, and wrong now
    with open_mesh(session.recipe.parallel, session.recipe.train.device, timeout_seconds=timeout) as mesh, watch.listening():
        problem: InputError | None = None
        if mesh.is_main:
            try:
                run.acquire()
            except InputError as error:
                problem = error
        if (problem := mesh.broadcast(problem)) is not None:
            raise problem
        try:
            with _determinism(session.recipe.train.deterministic):
                return _train(session, run, mesh, watch)
        finally:
            run.release()


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Ask torch for algorithms that give the same bits each time, while the block runs; an operation that has none is an error."""

    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS reads for it, before its first call
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _say(mesh: Mesh) -> Callable[[str], None]:
    return lambda text: print(text, file=sys.stderr, flush=True) if mesh.is_main else None


@dataclass(frozen=True)
class _Opened:
    """What is known once the run, its start and its data are open."""

    recipe: Recipe
    start: Start
    data: Data
    total_steps: int


@dataclass(frozen=True)
class _Built:
    """The model as it will be trained, and what it is trained with."""

    model: Any
    optimizer: torch.optim.Optimizer
    progress: Progress
    micro_rows: int
    compiled: bool


def _train(session: Session, run: RunFolder, mesh: Mesh, watch: StopWatch) -> Outcome:

    say = _say(mesh)
    if (done := run.marker(COMPLETE)) is not None:
        _check_finished(session, int(done["step"]))
        say(f"{run.path}: complete at step {done['step']}; nothing to do (final model in {run.path / 'final_model'})")
        return Outcome(int(done["step"]), "complete")
    _set_threads(session.recipe, mesh)
    opened = _open(session, run, mesh, say)
    built = _build(session, opened, run, mesh)
    recipe, start, progress = opened.recipe, opened.start, built.progress
    if mesh.is_main:
        record_start(run, recipe, opened.data, built.model, start, mesh, built.micro_rows, opened.total_steps, say)
    mesh.barrier()
    metrics = MetricsLog(run.path, recipe.log, enabled=mesh.is_main, run_name=run.run_id)
    metrics.write("resume" if start.checkpoint is not None and start.own else "start", progress.step, parent=start.parent)
    trainer = Trainer(
        recipe=recipe,
        run=run,
        model=replicate(built.model, mesh),
        compiled=built.compiled,
        optimizer=built.optimizer,
        data=opened.data,
        mesh=mesh,
        objective=session.stage.objective(recipe, opened.data),
        services=service_makers.make_services(recipe, opened.data, run, mesh, built.micro_rows),
        metrics=metrics,
        watch=watch,
        total_steps=opened.total_steps,
        micro_rows=built.micro_rows,
        progress=progress,
        state=lambda step: run_state(step, recipe, opened.data, run, progress, mesh, start),
    )
    trainer.telemetry.flops_per_token, trainer.telemetry.peak_flops = service_makers.speed_of(recipe, mesh)
    try:
        return trainer.fit(session.stop_after_step, profile=session.profile)
    except ValueError as error:
        if "attention kernel" not in str(error):  # the model imports no error of ours: a forced kernel that cannot run is wrong input
            raise
        raise InputError(f"train.attention: {error}") from None
    finally:
        metrics.close()
        opened.data.close()


def _open(session: Session, run: RunFolder, mesh: Mesh, say: Callable[[str], None]) -> _Opened:
    """Find the start, compare configs, open the data; everything that can be wrong with the input is found here or in `_build`."""

    if mesh.is_main:
        clean_leftovers(run.path, say)
    mesh.barrier()
    given = session.recipe
    start = find_start(run, given, session.resume_from, say, data_from_start=session.data_from_start)
    _compare_config(start, session, say)
    data = _open_data(session, start, run, mesh)
    check_tokenizer(start, data.tokenizer.fingerprint, data.tokenizer_folder, session.allow)
    recipe = dataclasses.replace(given, model=fit_model_section(given, data.vocab_size, start))
    total_steps = steps_of(recipe, data)
    check_schedule(total_steps, recipe.optim, recipe.schedule)
    return _Opened(recipe, start, data, total_steps)


def _open_data(session: Session, start: Start, run: RunFolder, mesh: Mesh) -> Data:
    """The data as every rank reads it; with `data.reader = "rank-0"` opened there alone, so that the other nodes need no shards."""

    given = session.recipe
    alone = given.data.reader == "rank-0" and mesh.world_size > 1
    found: Data | InputError | None = None
    if mesh.is_main or not alone:
        try:
            found = session.stage.open_data(given, start.data_state, run.path, session.allow)
        except InputError as error:
            found = error
    if alone:
        found = mesh.broadcast(found)
    if isinstance(found, InputError):
        raise found
    return cast(Data, found)


def _build(session: Session, opened: _Opened, run: RunFolder, mesh: Mesh) -> _Built:
    """Weights, optimizer and restored state; then the switches that only change speed and memory."""

    recipe, start, data = opened.recipe, opened.start, opened.data
    weights: Any = build_weights(recipe, start)
    model = weights.to(mesh.device).train()
    if recipe.train.attention != "auto":
        check_attention(
            model, recipe.train.attention, compute_dtype(recipe.train.precision, mesh.device), documents=recipe.data.document_mask
        )
    optimizer = build_optimizer(model, recipe.optim)
    progress = Progress()
    if start.checkpoint is not None:
        load_tensors(start.checkpoint, run_tensors(model, optimizer), mesh)
        progress = Progress(**start.progress)
    elif start.family_file is not None:
        restore(start.family_file, model, optimizer, _say(mesh))
        progress = Progress(**start.progress)
    choice = choose(recipe, mesh)
    configure_model(model, recipe, choice)
    micro_rows = choose_micro_rows(model, session.stage.objective(recipe, data), recipe, data, progress.step, mesh, choice, run.path)
    plan = plan_of(recipe, choice, micro_rows, mesh)
    if mesh.is_main:
        write_json(run.path / "plan.json", plan)
    if returns_memory(recipe.train, mesh.device.type, plan["memory_total"]):
        return_freed_memory()
    on_cuda = mesh.device.type == "cuda"
    compiled = compile_blocks(model, wanted=recipe.train.compile == "on" or (recipe.train.compile == "auto" and on_cuda))
    return _Built(model, optimizer, progress, micro_rows, compiled)


def _set_threads(recipe: Recipe, mesh: Mesh) -> None:

    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    elif mesh.world_size > 1 and mesh.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))


def _compare_config(start: Start, session: Session, say: Callable[[str], None]) -> None:
    """List every key that differs from the checkpoint's recipe; in its own run, one that changes what is trained needs `--allow`."""
    if start.recipe_tree is None:
        return
    found = _changes(start, session.recipe)
    refused = []
    for path, (old, new) in found.items():
        free = path.startswith(FREE_KEYS) or not start.own
        allowed = free or any(path == name or path.startswith(f"{name}.") for name in session.allow)
        say(f"changed since the checkpoint: {path}: {old!r} -> {new!r}{'' if allowed else '  (refused)'}")
        if not allowed:
            refused.append(path)
    if refused:
        flags = " ".join(refused)
        raise InputError(f"{session.folder}: the recipe differs from the run's in {', '.join(refused)}; restore it, or say --allow {flags}")


def _changes(start: Start, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    return differences(start.recipe_tree or {}, to_tree(dataclasses.replace(recipe, model=start.stored_model(recipe.model))))


def _check_finished(session: Session, step: int) -> None:
    """A finished run does nothing more; asked to train something else, it says so instead of doing nothing."""

    last = session.folder / LAST
    if not (last / STATE).is_file():
        return
    found = _changes(Start("", recipe_tree=read_state(last)["recipe"]), session.recipe)
    changed = [f"{path}: {old!r} -> {new!r}" for path, (old, new) in found.items() if not path.startswith(FREE_KEYS)]
    if changed:
        raise InputError(
            f"{session.folder}: complete at step {step}, with another recipe ({'; '.join(changed)}); a finished run is not trained "
            f"further: give another --run, and --resume-from {last} to go on from its end"
        )


def finish_or_stop(outcome: Outcome, run: Path) -> None:
    """Raise Stopped (exit code 3) for a session that ended on request."""
    if not outcome.complete:
        raise Stopped(f"stopped at step {outcome.step} ({outcome.reason}); the same command resumes it from {run}")


__all__ = ["FREE_KEYS", "Session", "finish_or_stop", "run_session", "steps_of", "train_session"]
