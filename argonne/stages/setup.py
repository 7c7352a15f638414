"""Setting a run up: its start, its data, and the model in the one right order, weights -> parallelise -> optimizer ->
restore -> compile.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from argonne.config import CHAT_STAGES, Recipe, TrainSection
from argonne.data.loader import Loader
from argonne.errors import InputError
from argonne.files import read_json, write_json, write_text
from argonne.keys import all_keys, check_schedule, idle_without_held_out, is_free, unmet, without_idle_keys
from argonne.layout import COMPUTE_PLAN, CONFIG
from argonne.legacy.training import restore
from argonne.model.build import check_attention
from argonne.model.products import multiply_by_onednn
from argonne.parallel.compile import compile_blocks
from argonne.parallel.context import CONTEXT
from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import MicroBatch, Objective
from argonne.parallel.parallelise import REPLICATED, Mode, Parallelised
from argonne.parallel.pipeline import PIPELINE
from argonne.parallel.shard import SHARDED
from argonne.parallel.tensor import TENSOR
from argonne.plan import Device, Setup, choose_setup, plan_of_run, running_device, shape_of
from argonne.plan.build import check_length
from argonne.plan.build import total_steps as planned_steps
from argonne.plan.processor import AMD, vendor
from argonne.plan.shape import fitted, short_base
from argonne.plan.stages import idle_share
from argonne.recipe import differences, to_toml, to_tree
from argonne.stages.chat_tokens import ADDED_TOKENS, added_tokens, told
from argonne.stages.stage import Stage, StageData
from argonne.stages.start import Start, check_tokenizer, find_start, settled_train
from argonne.train.allocator import LARGE_RUN, return_freed_memory
from argonne.train.checkpoint import clean_leftovers, load_tensors, rewind, run_tensors
from argonne.train.data import Batches, Data
from argonne.train.guard import StopWatch
from argonne.train.micro_batch import MICRO_ROWS_FILE, probe_micro_rows
from argonne.train.optim import Precision, build_optimizer
from argonne.train.run import RunFolder
from argonne.train.saving import Progress
from argonne.train.schedule import curve
from argonne.train.trainer import Trained

HISTORY = "# Changed at step "


@dataclass(frozen=True)
class Session:
    """What a training verb was asked to do. `watch`: it listens already. `given_mode`: another way to spread the model
    over the workers than the one that the recipe's degrees ask for.
    """

    recipe: Recipe
    folder: Path
    stage: Stage
    resume_from: Path | None = None
    allow: frozenset[str] = frozenset()
    stop_after_step: int | None = None
    watch: StopWatch | None = None
    profile: bool = False
    data_from_start: bool = False
    rewind: int | None = None
    take_over: bool = False
    given_mode: Mode | None = None

    @property
    def mode(self) -> Mode:
        asked = self.recipe.parallel
        degrees = {PIPELINE: asked.pipeline, TENSOR: asked.tensor, CONTEXT: asked.context, SHARDED: asked.shard}
        return self.given_mode or next((mode for mode, degree in degrees.items() if degree > 1), REPLICATED)


@dataclass(frozen=True)
class Opened:
    """What is known once the run, its start and its data are open. `idle`: keys that do nothing with this data.
    `changed`: keys that are other than in the session before, as `section.key -> (old, new)`.
    """

    recipe: Recipe
    start: Start
    data: StageData
    total_steps: int
    idle: list[str]
    changed: dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Built:
    """The model as it will be trained, what it is trained with, where it stands, and the batches of this rank.

    recipe: with every `auto` as it came out here.
    """

    recipe: Recipe
    trained: Trained
    progress: Progress
    loader: Loader


def open_run(session: Session, run: RunFolder, mesh: Mesh, log: Callable[[str], None]) -> Opened:
    """Find the start, compare configs, open the data; everything that can be wrong with the input is found here or in
    `build`.
    """
    if mesh.is_main:
        clean_leftovers(run.path, log)
        # Once: workers that start again go on from what was saved since.
        if session.rewind is not None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            rewind(run.path, session.rewind, log)
    mesh.barrier()
    start = find_start(run, session.recipe, session.resume_from, log, data_from_start=session.data_from_start)
    changed = _compare_config(start, session, mesh, log)
    given = dataclasses.replace(session.recipe, train=settled_train(session.recipe, start, mesh))
    _check_before_reading(given, start)
    alone = _reads_alone(given, mesh)
    found: StageData | InputError | None = None
    if mesh.is_main or not alone:
        try:
            found = session.stage.open_data(given, start.data_state, run.path, session.allow)
        except InputError as error:
            found = error
    if alone:
        found = mesh.broadcast(found)
    if isinstance(found, InputError):
        raise found
    data = cast(StageData, found)
    check_tokenizer(start, data.tokenizer, session.allow)
    start = dataclasses.replace(start, new_tokens=data.tokenizer.added if start.weights else None)
    recipe = fitted(given, data.vocab_size, start.architecture)
    total_steps = planned_steps(recipe, data.tokens_before, lambda: data.tokens_per_epoch) or 0
    if start.own and total_steps < start.progress["step"]:
        raise InputError(
            f"train: {total_steps:,} steps, but the run has trained {start.progress['step']:,}; train at least as "
            "many, or go back with --rewind N"
        )
    data.check_steps(total_steps)
    check_schedule(total_steps, recipe.schedule)
    held_out = next(data.held_out(1, 1), None) is not None or bool(recipe.data.input and recipe.data.hold_out)
    return Opened(recipe, start, data, total_steps, [] if held_out else idle_without_held_out(recipe), changed)


def _check_before_reading(recipe: Recipe, start: Start) -> None:
    """Raise InputError for what the recipe and the weights tell without the data, of which reading may take minutes."""
    if not start.progress.get("step"):  # else what was trained before counts too
        check_length(recipe)
    if (weights := start.architecture) is not None:  # rows of new tokens are the data's to say
        fitted(recipe, None, {**weights, "vocab_size": recipe.model.vocab_size or weights["vocab_size"]})
    if not (recipe.chat.hold_out if recipe.stage in CHAT_STAGES else recipe.data.hold_out or recipe.data.sources):
        idle_without_held_out(recipe)
    if recipe.eval.tasks:
        from argonne.stages.measured import check_tasks

        check_tasks(recipe)


def _reads_alone(recipe: Recipe, mesh: Mesh) -> bool:
    """Does rank 0 open the data for all (`data.reader = "rank-0"`), so that the other nodes need no shards?"""
    return recipe.data.reader == "rank-0" and mesh.world_size > 1


def record_start(
    run: RunFolder,
    recipe: Recipe,
    opened: Opened,
    mesh: Mesh,
    micro_rows: int,
    log: Callable[[str], None],
) -> None:
    """Write config (with the changes of earlier sessions and of this one as comments) and manifest, print what is about
    to run.
    """
    data, start, total_steps = opened.data, opened.start, opened.total_steps
    sizes = shape_of(recipe.model, recipe.data.sequence_length)
    parameters = sizes.parameters()
    run.clear_markers()
    known = (run.path / CONFIG).read_text().splitlines() if (run.path / CONFIG).exists() else []
    history = [line for line in known if line.startswith(HISTORY)]
    step = int(start.progress.get("step", 0))
    history += [f"{HISTORY}{step}, {path}: {old!r} -> {new!r}" for path, (old, new) in opened.changed.items()]
    write_text(run.path / CONFIG, "\n".join([to_toml(recipe, opened.idle), *history, ""]))
    added = added_tokens(run, recipe, start, data.tokenizer.added) if data.chat is not None else None
    run.write_manifest(
        {
            "stage": recipe.stage,
            "parameters": parameters,
            "total_steps": total_steps,
            "data_fingerprint": data.fingerprint,
            "tokenizer_fingerprint": data.tokenizer.fingerprint,
            **({ADDED_TOKENS: added} if added else {}),
            "world_size": mesh.world_size,
            "device": str(mesh.device),
            "micro_rows": micro_rows,
            "parent": start.parent,
            "tokens_before": start.tokens_before,
        }
    )
    if added is not None:
        log(told(added, start.new_tokens is not None))
    for text in data.description:
        log(text)
    rows, length = data.rows(step), data.sequence_length(step)
    # The weights say what the model is: of a preset beside them only some defaults are left.
    origin = f"from {recipe.model.init_from}" if recipe.model.init_from else recipe.model.preset or "sizes of its own"
    log(f"model: {parameters:,} parameters, {recipe.model.num_hidden_layers} layers, {origin}")
    log(
        f"batch: {rows * length:,} tokens a step = {rows} rows x {length}, {micro_rows} rows a micro-batch on "
        f"{mesh.world_size} x {mesh.device.type}{_spread(mesh, rows, micro_rows)}; {total_steps:,} steps, "
        f"{data.tokens_before(total_steps):,} tokens"
    )
    rates = "  ".join(f"{step}: {rate:.3g}" for step, rate in curve(total_steps, recipe.optim, recipe.schedule))
    log(f"learning rate at steps {rates}")
    if short := short_base(recipe.model, sizes.head_dim, sizes.max_position_embeddings):
        log(f"warning: {short}")
    log(start.description)


def _spread(mesh: Mesh, rows: int, micro_rows: int) -> str:
    """How the model, and the rows of a step, lie over the workers."""
    parts = mesh.pipeline * mesh.inner // mesh.context * (mesh.shard * mesh.context if mesh.shard > 1 else 1)
    told = f" ({mesh.world_size // parts} copies in {parts} parts)" if parts > 1 else ""
    told += f", each row in {mesh.context} parts" if mesh.context > 1 else ""
    if mesh.pipeline > 1:
        number = -(-rows // mesh.data_size // micro_rows)
        idle = idle_share(mesh.pipeline, mesh.stages, number)
        told += f", {mesh.pipeline * mesh.stages} stages, {mesh.schedule}, idle {idle:.0%} of a step"
    return told


def build(session: Session, opened: Opened, run: RunFolder, mesh: Mesh, log: Callable[[str], None]) -> Built:
    """The model on its mesh, the optimizer over what will really be trained, the restored state; then what only changes
    speed and memory.
    """
    recipe, start, data, stage = opened.recipe, opened.start, opened.data, session.stage
    device = planned_device(mesh.device)
    choice = choose_setup(recipe, device, mesh.world_size, overrun="memory" in session.allow)
    weights = stage.weights(recipe, start)
    progress = Progress(**start.progress)
    precision = Precision(recipe.train.precision, mesh.device, progress.scaler)
    kernels = check_attention(
        *(weights.config, mesh.device, recipe.train.attention, precision.dtype),
        documents=data.document_mask,
        part=mesh.context > 1,
    )
    configure_model(weights.model, recipe, choice)
    objective = stage.objective(recipe, data)
    parallelised = session.mode.parallelise(weights, mesh, objective, precision)
    optimizer = build_optimizer(parallelised.plain, recipe.optim, mesh)
    if start.checkpoint is not None:
        load_tensors(start.checkpoint, run_tensors(parallelised.plain, optimizer), mesh)
    elif start.family_file is not None:
        restore(start.family_file, parallelised.plain, optimizer, log)
    data.attach(parallelised, mesh)
    exchange = mesh if _reads_alone(recipe, mesh) else None
    loader = Loader(data, mesh.data_rank, mesh.data_size, 1, pin_memory=mesh.device.type == "cuda", exchange=exchange)
    loader.set_micro_rows(
        choose_micro_rows(
            parallelised, objective, precision, recipe, data, loader, progress.step, mesh, choice, run.path
        )
    )
    plan = plan_of_run(recipe, dataclasses.replace(choice, rows=loader.micro_rows), device, mesh.world_size)
    if mesh.is_main:  # `inspect` sets it beside what was measured
        write_json(run.path / COMPUTE_PLAN, plan)
    if returned := returns_memory(recipe.train, mesh.device.type, plan["memory_total"]):
        return_freed_memory()
    compiled = recipe.train.compile == "on" or (recipe.train.compile == "auto" and mesh.device.type == "cuda")
    if compiled:
        compile_blocks(parallelised.plain, tensor=recipe.parallel.tensor > 1)
    settled = dataclasses.replace(
        recipe.train,
        precision=precision.name,
        device=mesh.device.type,
        attention=kernels.pop() if len(kernels) == 1 else "auto",
        compile="on" if compiled else "off",
        activation_checkpointing=choice.activation_checkpointing,
        loss=choice.loss,
        return_memory="on" if returned else "off",
    )
    batch = dataclasses.replace(recipe.batch, micro=loader.micro_rows)
    settled_recipe = without_idle_keys(dataclasses.replace(recipe, train=settled, batch=batch, given=frozenset()))
    return Built(settled_recipe, Trained(parallelised, optimizer, precision, compiled), progress, loader)


def _compare_config(
    start: Start, session: Session, mesh: Mesh, log: Callable[[str], None]
) -> dict[str, tuple[Any, Any]]:
    """Every key that differs from the checkpoint's recipe, told; in its own run, one that changes what is trained needs
    `--allow`.
    """
    if start.recipe_tree is None:
        return {}
    found = changes(start, session.recipe)
    if start.own and (device := start.recipe_tree["train"]["device"]) not in ("auto", mesh.device.type):
        found["train.device"] = (device, mesh.device.type)
    refused = []
    for path, (old, new) in found.items():
        free = is_free(path) or not start.own
        allowed = free or any(path == name or path.startswith(f"{name}.") for name in session.allow)
        log(f"changed since the checkpoint: {path}: {old!r} -> {new!r}{'' if allowed else '  (refused)'}")
        if not allowed:
            refused.append(path)
    if refused:
        flags = " ".join(refused)
        raise InputError(
            f"{session.folder}: the recipe differs from the run's in {', '.join(refused)}; restore it, or say --allow "
            f"{flags}"
        )
    return found


def changes(start: Start, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """The keys in which a recipe differs from the one of a checkpoint, without those that do nothing, or leave it to
    the run.
    """
    found = differences(start.recipe_tree or {}, to_tree(start.settled(recipe)))
    keys = all_keys()
    return {
        path: pair
        for path, pair in found.items()
        if path not in keys or (pair[1] != "auto" and unmet(recipe, path) is None)
    }


def returns_memory(train: TrainSection, device_type: str, planned_bytes: float) -> bool:
    """Does this run give freed memory back at once?"""
    if device_type != "cpu" or train.return_memory == "off":
        return False
    return train.return_memory == "on" or planned_bytes >= LARGE_RUN


def planned_device(device: torch.device) -> Device:
    """A device of this machine as the plan knows it."""
    if device.type != "cuda":
        return running_device("cpu")
    facts = torch.cuda.get_device_properties(device)
    return running_device(facts.name, facts.total_memory)


def choose_micro_rows(
    model: Parallelised,
    objective: Objective,
    precision: Precision,
    recipe: Recipe,
    data: Data,
    loader: Batches,
    step: int,
    mesh: Mesh,
    choice: Setup,
    run: Path,
) -> int:
    """Rows of one forward pass on one device: the recipe's number; on a GPU found by trying, upward from the plan's;
    4,096 tokens on the CPU.
    """
    rows, length = -(-data.rows(step) // mesh.data_size), data.sequence_length(step)
    # Never more than an earlier session of the run had to back off to.
    recorded = int(read_json(run / MICRO_ROWS_FILE)["rows"]) if (run / MICRO_ROWS_FILE).exists() else None
    share = min(rows, recorded or rows)
    if isinstance(recipe.batch.micro, int):
        return min(recipe.batch.micro, share)
    if mesh.device.type != "cuda":
        return max(1, min(share, choice.rows, 4096 // length))
    if model.forward != "alone" or mesh.inner > 1:  # a try is a collective, which no rank can leave: the plan decides
        return max(1, min(share, choice.rows))
    if recorded is not None:
        return share

    def micro_of(rows: int) -> MicroBatch:
        loader.set_micro_rows(rows)
        return loader.batch(step).micro_batches[0]

    return probe_micro_rows(model.plain, objective, precision, mesh, micro_of, guess=choice.rows, most=share)


def configure_model(model: Any, recipe: Recipe, choice: Setup) -> None:
    """Training-only switches of the model: the recipe's, and for `auto` what was chosen by memory."""
    model.configure_training(
        attention=recipe.train.attention,
        activation_checkpointing=choice.activation_checkpointing,
        checkpointing_stride=choice.checkpointing_stride,
        loss=choice.loss,
        loss_chunk=recipe.train.loss_chunk,
        z_loss=recipe.train.z_loss,
    )
    if choice.cpu and choice.precision == "fp32" and vendor() == AMD:  # MKL is made for Intel's
        multiply_by_onednn(model)
