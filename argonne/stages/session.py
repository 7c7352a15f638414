"""One session of a training run: join the workers, own the run, find where it starts, hand everything to the loop. Every stage uses it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argonne.config import Recipe
from argonne.errors import InputError, Stopped
from argonne.recipe import differences, to_toml, to_tree
from argonne.stages import services as service_makers
from argonne.stages.start import Start, build_weights, find_start, fit_model_section

if TYPE_CHECKING:
    from torch import nn

    from argonne.data.loader import TrainingData
    from argonne.parallel.mesh import Mesh
    from argonne.train.run import RunFolder
    from argonne.train.step import Objective
    from argonne.train.trainer import Outcome

# Keys that cannot change what is trained: they may differ on resume, and are listed.
FREE_KEYS = (
    "log.", "stop.", "parallel.", "checkpoint.", "eval.", "batch.micro", "train.threads", "train.compile", "train.activation_checkpointing",
    "train.checkpointing_stride", "train.loss", "train.loss_chunk", "data.reader", "data.verify", "data.prefetch",
)  # fmt: skip


@dataclass(frozen=True)
class Session:
    """What a training verb was asked to do."""

    recipe: Recipe
    folder: Path
    objective: Objective
    resume_from: Path | None = None
    allow: frozenset[str] = frozenset()
    stop_after_step: int | None = None
    started: float | None = None
    profile: bool = False


def run_session(session: Session) -> Outcome:
    """Run one session to its end, on local workers of its own where the recipe or the GPUs of this machine ask for several."""
    from argonne.parallel.launch import run_workers, worker_count
    from argonne.train.guard import parse_duration

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
    from argonne.parallel.launch import let_the_cause_speak_first

    try:
        return train_session(session)
    except InputError as error:
        return error
    except RuntimeError as error:
        let_the_cause_speak_first(error)
        raise


def train_session(session: Session) -> Outcome:
    """This process's part of a session. Raises InputError for wrong input before any work is done."""
    from argonne.parallel.mesh import open_mesh
    from argonne.train.guard import StopWatch, parse_duration
    from argonne.train.run import RunFolder

    watch = StopWatch(session.recipe.stop, started=session.started)
    run = RunFolder(session.folder)
    timeout = parse_duration(session.recipe.parallel.timeout, "parallel.timeout")
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
            return _train(session, run, mesh, watch)
        finally:
            run.release()


def _say(mesh: Mesh) -> Callable[[str], None]:
    return lambda text: print(text, file=sys.stderr, flush=True) if mesh.is_main else None


def _train(session: Session, run: RunFolder, mesh: Mesh, watch: Any) -> Outcome:
    from argonne.data.loader import open_training_data
    from argonne.files import write_json
    from argonne.parallel.apply import compile_blocks, replicate
    from argonne.train.checkpoint import clean_leftovers, load_tensors, run_tensors
    from argonne.train.metrics import MetricsLog
    from argonne.train.optim import build_optimizer
    from argonne.train.run import COMPLETE
    from argonne.train.schedule import check_schedule
    from argonne.train.step import recorded_micro_rows
    from argonne.train.trainer import Outcome, Progress, Trainer

    say = _say(mesh)
    if (done := run.marker(COMPLETE)) is not None:
        say(f"{run.path}: complete at step {done['step']}; nothing to do (final model in {run.path / 'final_model'})")
        return Outcome(int(done["step"]), "complete")
    if mesh.is_main:
        clean_leftovers(run.path, say)
    mesh.barrier()
    _set_threads(session.recipe, mesh)
    start = find_start(run, session.recipe, session.resume_from, say)
    _compare_config(start, session, say)
    data = open_training_data(
        session.recipe.data,
        session.recipe.batch,
        session.recipe.seed,
        state=start.data_state,
        run_folder=run.path,
        allow=session.allow,
    )
    recipe = dataclasses.replace(session.recipe, model=fit_model_section(session.recipe, data.vocab_size, start))
    total_steps = steps_of(recipe, data)
    check_schedule(total_steps, recipe.optim, recipe.schedule)
    weights: Any = build_weights(recipe, start)
    model = weights.to(mesh.device).train()
    optimizer = build_optimizer(model, recipe.optim)
    progress = Progress()
    if start.checkpoint is not None:
        load_tensors(start.checkpoint, run_tensors(model, optimizer), mesh)
        progress = Progress(**start.progress)
    plan = planned(recipe, mesh)
    micro_rows = choose_micro_rows(recipe, data.rows(progress.step), mesh, plan, recorded_micro_rows(run.path))
    _configure(model, recipe, plan)
    compiled = compile_blocks(model, wanted=recipe.train.compile == "on" or (recipe.train.compile == "auto" and mesh.device.type == "cuda"))
    if mesh.is_main:
        if plan is not None:
            write_json(run.path / "plan.json", plan)
        _record_start(run, recipe, data, model, start, mesh, micro_rows, total_steps, say)
    mesh.barrier()
    metrics = MetricsLog(run.path, recipe.log, enabled=mesh.is_main, run_name=run.run_id)
    metrics.write("resume" if start.checkpoint is not None and start.own else "start", progress.step, parent=start.parent)
    trainer = Trainer(
        recipe=recipe,
        run=run,
        model=replicate(model, mesh),
        compiled=compiled,
        optimizer=optimizer,
        data=data,
        mesh=mesh,
        objective=session.objective,
        services=service_makers.make_services(recipe, data, run, mesh, micro_rows),
        metrics=metrics,
        watch=watch,
        total_steps=total_steps,
        micro_rows=micro_rows,
        progress=progress,
        state=lambda step: _state(step, recipe, data, run, progress, mesh, start),
    )
    trainer.telemetry.flops_per_token, trainer.telemetry.peak_flops = service_makers.speed_of(recipe, mesh)
    try:
        return trainer.fit(session.stop_after_step, profile=session.profile)
    finally:
        metrics.close()


def _set_threads(recipe: Recipe, mesh: Mesh) -> None:
    import os

    import torch

    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    elif mesh.world_size > 1 and mesh.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))


def _compare_config(start: Start, session: Session, say: Callable[[str], None]) -> None:
    """List every key that differs from the checkpoint's recipe; one that changes what is trained needs `--allow`."""
    if start.recipe_tree is None or not start.own:
        return
    found = differences(start.recipe_tree, to_tree(dataclasses.replace(session.recipe, model=start.stored_model(session.recipe.model))))
    refused = []
    for path, (old, new) in found.items():
        free = path.startswith(FREE_KEYS)
        allowed = free or any(path == name or path.startswith(f"{name}.") for name in session.allow)
        say(f"changed since the checkpoint: {path}: {old!r} -> {new!r}{'' if allowed else '  (refused)'}")
        if not allowed:
            refused.append(path)
    if refused:
        flags = " ".join(refused)
        raise InputError(f"{session.folder}: the recipe differs from the run's in {', '.join(refused)}; restore it, or say --allow {flags}")


def steps_of(recipe: Recipe, data: TrainingData) -> int:
    """Optimizer steps of the run. A length in tokens or epochs is rounded down to whole steps: never more than was asked for."""
    train = recipe.train
    if train.steps is not None:
        total = train.steps
    else:
        tokens = train.tokens if train.tokens is not None else int((train.epochs or 0) * data.tokens_per_epoch)
        total = _steps_within(data, tokens)
        if total < 1:
            raise InputError(
                f"train: {tokens:,} tokens make no whole step of batch.tokens_per_step = {recipe.batch.tokens_per_step:,}; "
                "train longer or take a smaller batch"
            )
    if total < 1:
        raise InputError(f"train.steps: found {total}, expected at least 1")
    data.check_steps(total)
    return total


def _steps_within(data: TrainingData, tokens: int) -> int:
    """The most steps that draw at most `tokens` tokens, whatever changes of batch lie between."""
    low, high = 0, 1
    while data.tokens_before(high) <= tokens:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if data.tokens_before(middle) <= tokens else (low, middle)
    return low


def choose_micro_rows(recipe: Recipe, rows: int, mesh: Mesh, plan: dict[str, Any] | None, recorded: int | None) -> int:
    """Rows of one forward pass on one device: the recipe's number; the plan's on a GPU; on the CPU what memory traffic likes, 4,096 tokens.

    `recorded`: what an earlier session had to back off to; never more than that.
    """
    share = min(-(-rows // mesh.world_size), recorded or rows)
    if isinstance(recipe.batch.micro, int):
        return min(recipe.batch.micro, share)
    if plan is not None and mesh.device.type == "cuda":
        return max(1, min(share, int(plan["micro_rows"])))
    return max(1, min(share, 4096 // recipe.data.sequence_length))


def planned(recipe: Recipe, mesh: Mesh) -> dict[str, Any] | None:
    """The plan of this run on these devices, None for a device that the plan does not know."""
    import torch

    from argonne.plan import make_plan
    from argonne.plan.devices import find_device

    name: str | None = "cpu"
    if mesh.device.type == "cuda":
        device = find_device(torch.cuda.get_device_name(mesh.device))
        name = device.name if device is not None else None
    if name is None or mesh.device.type == "mps":
        return None
    return make_plan(recipe, gpu=name, gpus=mesh.world_size).to_dict()


def _configure(model: Any, recipe: Recipe, plan: dict[str, Any] | None) -> None:
    """Training-only switches of the model, as the recipe says; `auto` is what the plan chose by memory."""
    train = recipe.train
    by_plan = plan or {"activation_checkpointing": "none", "checkpointing_stride": train.checkpointing_stride, "loss": "chunked"}
    checkpointing, stride, loss = train.activation_checkpointing, train.checkpointing_stride, train.loss
    if checkpointing == "auto":
        checkpointing, stride = by_plan["activation_checkpointing"], by_plan["checkpointing_stride"]
    model.configure_training(
        attention=train.attention,
        activation_checkpointing=checkpointing,
        checkpointing_stride=stride,
        loss=by_plan["loss"] if loss == "auto" else loss,
        loss_chunk=train.loss_chunk,
        z_loss=train.z_loss,
    )


def _record_start(
    run: RunFolder,
    recipe: Recipe,
    data: TrainingData,
    model: nn.Module,
    start: Start,
    mesh: Mesh,
    micro_rows: int,
    total_steps: int,
    say: Callable[[str], None],
) -> None:
    """Write config and manifest, print what is about to run."""
    from argonne.data.tokenizer import load_tokenizer
    from argonne.train.schedule import curve

    parameters = sum(parameter.numel() for parameter in model.parameters())
    run.clear_markers()
    run.write_config(to_toml(recipe))
    run.write_manifest(
        {
            "stage": recipe.stage,
            "parameters": parameters,
            "total_steps": total_steps,
            "data_fingerprint": data.fingerprint,
            "tokenizer_fingerprint": load_tokenizer(data.tokenizer_folder).fingerprint,
            "world_size": mesh.world_size,
            "device": str(mesh.device),
            "micro_rows": micro_rows,
            "parent": start.parent,
        }
    )
    for text in data.description:
        say(text)
    rows, length = data.rows(0), data.sequence_length(0)
    say(
        f"model: {parameters:,} parameters, {recipe.model.num_hidden_layers} layers, {recipe.model.preset or 'from ' + str(recipe.model.init_from)}"
    )
    say(
        f"batch: {rows * length:,} tokens a step = {rows} rows x {length}, {micro_rows} rows a micro-batch "
        f"on {mesh.world_size} x {mesh.device.type}; {total_steps:,} steps, {data.tokens_before(total_steps):,} tokens"
    )
    rates = "  ".join(f"{step}: {rate:.3g}" for step, rate in curve(total_steps, recipe.optim, recipe.schedule))
    say(f"learning rate at steps {rates}")
    say(start.description)


def _state(step: int, recipe: Recipe, data: TrainingData, run: RunFolder, progress: Any, mesh: Mesh, start: Start) -> dict[str, Any]:
    """state.json: counts and identities, never buffers."""
    from argonne.data.tokenizer import load_tokenizer

    return {
        "run_id": run.run_id,
        "tokens": data.tokens_before(step),
        "samples": data.samples_before(step),
        "progress": dataclasses.asdict(progress),
        "recipe": to_tree(recipe),
        "data": data.state(step),
        "tokenizer_fingerprint": load_tokenizer(data.tokenizer_folder).fingerprint,
        "world_size": mesh.world_size,
        "parent": start.parent,
    }


def finish_or_stop(outcome: Outcome, run: Path) -> None:
    """Raise Stopped (exit code 3) for a session that ended on request."""
    if not outcome.complete:
        raise Stopped(f"stopped at step {outcome.step} ({outcome.reason}); the same command resumes it from {run}")


__all__ = ["FREE_KEYS", "Session", "finish_or_stop", "run_session", "steps_of", "train_session"]
