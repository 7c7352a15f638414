"""One session of a training run: join the workers, own the run, hand everything to the loop. Every stage uses it."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import cast

import torch
from torch import nn

from argonne.errors import Ended, InputError, Stopped, first_line
from argonne.files import fingerprint
from argonne.keys import check_sizes, is_free, parse_duration
from argonne.layout import FINAL_MODEL, LOCK, last_checkpoint
from argonne.model.kernels import KernelUnavailable
from argonne.parallel.launch import let_the_cause_speak_first, run_workers
from argonne.parallel.mesh import Mesh, choose_device, open_mesh, worker_count
from argonne.parallel.neighbours import beside_others
from argonne.parallel.nodes import place_of
from argonne.plan import settle
from argonne.plan.shape import weights_on_disk
from argonne.recipe import to_tree
from argonne.stages.chat_tokens import ADDED_TOKENS
from argonne.stages.hooks import banner, checkpoint_files, export_final, of_newest, run_state
from argonne.stages.setup import Built, Opened, Session, build, changes, open_run, planned_device, record_start
from argonne.stages.start import Start
from argonne.train.aside import Sampled, Work
from argonne.train.checkpoint import list_checkpoints, read_state
from argonne.train.guard import StopWatch
from argonne.train.run import COMPLETE, STOPPED, RunFolder
from argonne.train.telemetry import MetricsLog
from argonne.train.trainer import Hooks, Outcome, Trainer

# Measured beside training, by name.
Tasks = dict[str, Callable[[nn.Module], Work[Sampled]]]
# What a network file system may take to show a new file to other nodes.
SEEN_SECONDS = 30.0
# What every worker imports.
PRELOADED = ("torch.distributed", "transformers", "argonne.stages.session")


def run_session(session: Session) -> Outcome:
    """Run one session to its end, on local workers of its own where the recipe or the GPUs of this machine ask for
    several.
    """
    place = place_of(os.environ) if "NNODES" in os.environ else None
    nodes = 1 if place is None else place.nodes
    count = worker_count(session.recipe.parallel, session.recipe.train.device, nodes)
    workers = int(os.environ.get("WORLD_SIZE", count * nodes))
    session = _with_degrees(session, workers, int(os.environ.get("LOCAL_WORLD_SIZE", count)))
    parallel = session.recipe.parallel
    session.mode.check(parallel, workers)
    for weights in filter(None, (session.resume_from, session.recipe.model.init_from)):
        check_sizes(weights_on_disk(str(weights)) or {}, parallel)
    session = dataclasses.replace(session, watch=session.watch or StopWatch(session.recipe.stop))
    try:
        if count == 1 and place is None:
            return train_session(session)
        results = run_workers(
            _work,
            (session,),
            count=count,
            max_restarts=parallel.max_restarts,
            grace_seconds=parse_duration(session.recipe.stop.grace, "stop.grace"),
            preload=PRELOADED,
            place=place,
            join_seconds=parse_duration(parallel.timeout, "parallel.timeout"),
        )
        for found in results:  # before an outcome of another rank
            if isinstance(found, Ended):
                raise found
        return cast(Outcome, results[0])
    except Stopped as stopped:
        _mark_stopped(session, str(stopped))
        raise


def _with_degrees(session: Session, workers: int, local: int) -> Session:
    """Degrees that are `auto` as the plan would have them on so many workers, `local` on each node."""
    recipe = session.recipe
    if not recipe.parallel.open:
        return session
    device = planned_device(choose_device(recipe.train.device, where="train.device"))
    device = dataclasses.replace(device, node=local)
    recipe, told = settle(recipe, device, workers, overrun="memory" in session.allow)
    if os.environ.get("RANK", os.environ.get("NODE_RANK", "0")) == "0":
        print(f"parallel: {told}", file=sys.stderr)
    return dataclasses.replace(session, recipe=recipe)


def _mark_stopped(session: Session, reason: str) -> None:
    """The marker of a session that could not leave one in its loop: the run stands at its newest checkpoint."""
    run = RunFolder(session.folder)
    if not run.exists() or run.marker(STOPPED) or run.marker(COMPLETE):
        return
    with suppress(InputError, OSError):  # another process has the run, or nothing can be written there
        run.acquire()
        try:
            saved = list_checkpoints(run.path)
            found = fingerprint(to_tree(session.recipe))[:16]
            run.write_marker(STOPPED, step=saved[-1].step if saved else 0, reason=reason, config_hash=found)
        finally:
            run.release()


def _work(session: Session) -> Outcome | Ended:
    """One worker's part. Wrong input, a request and divergence are results, not failures: the same on every try."""
    try:
        return train_session(session)
    except Ended as error:
        return error


def train_session(session: Session) -> Outcome:
    """This process's part of a session. Raises InputError for wrong input before any work is done, Stopped for a
    request that came before the first step or that a failure followed.
    """
    watch = session.watch or StopWatch(session.recipe.stop)
    with watch.listening():
        try:
            return _join(session, watch)
        except Ended:
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and os.environ.get("WORLD_SIZE", "1") != "1":
                let_the_cause_speak_first(error)
            if (reason := watch.reason()) is None:
                raise
            raise Stopped(f"asked to stop ({reason}), then {type(error).__name__}: {first_line(error)}") from error


def _join(session: Session, watch: StopWatch) -> Outcome:
    """Join the workers, own the run, train."""
    run = RunFolder(session.folder)
    timeout = parse_duration(session.recipe.parallel.timeout, "parallel.timeout")
    with open_mesh(session.recipe.parallel, session.recipe.train.device, timeout_seconds=timeout) as mesh:
        problem: InputError | None = None
        if mesh.is_main:
            try:
                run.acquire(take_over=session.take_over)
            except InputError as error:
                problem = error
        if (problem := mesh.broadcast(problem)) is not None:
            raise problem
        try:
            _check_alike(session, mesh)
            _take_threads(session.recipe.train.threads, mesh)
            patience = beside_others(_log if mesh.is_main else _nothing) if mesh.device.type == "cpu" else nullcontext()
            with _determinism(session.recipe.train.deterministic), patience:
                return _train(session, run, mesh, watch)
        finally:
            run.release()


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _nothing(text: str) -> None:
    """What workers say but the main one."""


def _take_threads(wanted: int, mesh: Mesh) -> None:
    if wanted:
        torch.set_num_threads(wanted)
    elif mesh.world_size > 1 and mesh.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))


def _check_alike(session: Session, mesh: Mesh) -> None:
    """Workers of several nodes were started by as many commands: all must say one recipe, and see one run folder."""
    if mesh.world_size == int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size)):
        return
    lock, end = session.folder / LOCK, time.monotonic() + SEEN_SECONDS
    owner = mesh.broadcast(lock.read_text() if mesh.is_main else None)
    while not (seen := lock.exists() and lock.read_text() == owner) and time.monotonic() < end:
        time.sleep(0.5)
    tree = {name: value for name, value in to_tree(session.recipe).items() if name not in ("parallel", "stop")}
    found = mesh.gather((socket.gethostname(), seen, fingerprint(tree)))
    for host, seen, said in found:
        if not seen:
            raise InputError(
                f"--run {session.folder}: {host} does not see what {found[0][0]} wrote there; give a folder that every "
                "node sees, by its whole path"
            )
        if said != found[0][2]:
            raise InputError(f"{host} was given another recipe than {found[0][0]}; give every node the same command")


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Ask torch for algorithms that give the same bits each time, while the block runs; an operation that has none is
    an error.
    """
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


def _train(session: Session, run: RunFolder, mesh: Mesh, watch: StopWatch) -> Outcome:
    log = _log if mesh.is_main else _nothing
    if (done := run.marker(COMPLETE)) is not None and session.rewind is None:
        _check_finished(session, int(done["step"]))
        log(f"{run.path}: complete at step {done['step']}; nothing to do (final model in {run.path / FINAL_MODEL})")
        return Outcome(int(done["step"]), "complete")
    with watch.interrupting():
        opened = open_run(session, run, mesh, log)
    recipe, start, data = opened.recipe, opened.start, opened.data
    metrics: MetricsLog | None = None
    tasks: Tasks = {}
    try:
        with watch.interrupting():
            if recipe.eval.tasks:
                from argonne.stages.measured import tasks_of

                tasks = tasks_of(recipe, data)
            built = build(session, opened, run, mesh, log)
        recipe, progress = built.recipe, built.progress
        if mesh.is_main:
            record_start(run, recipe, opened, mesh, built.loader.micro_rows, log)
        mesh.barrier()
        metrics = MetricsLog(run.path, recipe.log, enabled=mesh.is_main)
        event = "resume" if start.checkpoint is not None and start.own else "start"
        metrics.begin(event, progress.step, to_tree(recipe), run.run_id, parent=start.parent)
        if start.new_tokens is not None and mesh.is_main:
            metrics.write(ADDED_TOKENS, progress.step, **run.manifest()[ADDED_TOKENS])
        for path, (old, new) in opened.changed.items():
            metrics.write("change", progress.step, key=path, old=old, new=new)
        return Trainer(
            recipe,
            run,
            mesh,
            built.trained,
            data,
            built.loader,
            _hooks(session, opened, built, tasks, run, mesh),
            metrics=metrics,
            watch=watch,
            progress=progress,
            total_steps=opened.total_steps,
        ).fit(session.stop_after_step, profile=session.profile)
    except KernelUnavailable as error:  # the model imports no error of ours, and this is wrong input
        raise InputError(f"train.attention: {error}") from None
    finally:
        if metrics is not None:
            metrics.close()
        data.close()


def _hooks(session: Session, opened: Opened, built: Built, tasks: Tasks, run: RunFolder, mesh: Mesh) -> Hooks:
    """What the loop calls back: the stage's telemetry, and what is written of the run."""
    recipe, data, start = built.recipe, opened.data, opened.start
    shown = session.stage.shows(recipe, data, built.loader.micro_rows)
    samples = {**({"sampling": shown.sample} if shown.sample is not None else {}), **tasks}
    if built.trained.parallelised.forward == "never":
        samples = {
            name: partial(of_newest, run.path, lambda: session.stage.weights(recipe, start).fill("cpu"), hook)
            for name, hook in samples.items()
        }
    return Hooks(
        export=lambda model: export_final(model, run.path, data),
        checkpoint_files=lambda folder: checkpoint_files(folder, recipe, data),
        state=lambda step: run_state(step, recipe, data, run, built.progress, mesh, start),
        held_out=shown.held_out,
        samples=samples,
        before_first_step=start.weights is not None,
        judge=shown.judge,
        banner=lambda model: banner(model, run, recipe, mesh),
    )


def _check_finished(session: Session, step: int) -> None:
    """A finished run does nothing more; asked to train something else, it says so instead of doing nothing."""
    last = last_checkpoint(session.folder)
    if last is None:
        return
    found = changes(Start("", recipe_tree=read_state(last)["recipe"]), session.recipe)
    changed = [f"{path}: {old!r} -> {new!r}" for path, (old, new) in found.items() if not is_free(path)]
    if changed:
        raise InputError(
            f"{session.folder}: complete at step {step}, with another recipe ({'; '.join(changed)}); a finished run is "
            f"not trained further: give another --run, and --resume-from {last} to go on from its end"
        )
