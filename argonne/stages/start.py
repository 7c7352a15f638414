"""Where a run starts: its own newest checkpoint, a given checkpoint with its whole state, given
weights, or fresh ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from argonne.config import CHAT_STAGES, ModelSection, Recipe, TrainSection
from argonne.errors import InputError
from argonne.files import verify_directory
from argonne.layout import LEGACY_SUFFIXES, followed
from argonne.legacy.position import carried_position
from argonne.legacy.training import TrainingFile, read_training_file
from argonne.model.build import Weights, config_from_fields, fresh_weights
from argonne.model.load import identity_of, resolve_model, started_from, tokens_before
from argonne.parallel.mesh import Mesh
from argonne.plan.shape import ARCHITECTURE, left_to, with_new_tokens
from argonne.tokens.tokenizer import AddedTokens, TextTokenizer, load_tokenizer
from argonne.train.checkpoint import list_checkpoints, newest_complete, read_state
from argonne.train.optim import resolve_precision
from argonne.train.run import RunFolder

# `auto` that decides about the arithmetic: settled when a run is created, for good.
SETTLED = ("precision", "device", "attention")


@dataclass(frozen=True)
class Start:
    """`checkpoint` carries the whole state; `own`: it is this run's. `weights` are weights alone, with their config;
    `new_tokens`: what the run's tokenizer has beyond theirs. `tokens_before`: what the weights and
    their ancestors were trained on before step 0 of this run's count; None where nothing tells.
    """

    description: str
    checkpoint: Path | None = None
    own: bool = False
    weights: str | None = None
    weights_config: dict[str, Any] | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    data_state: dict[str, Any] | None = None
    recipe_tree: dict[str, Any] | None = None
    parent: dict[str, Any] | None = None
    tokenizer_fingerprint: str | None = None
    family_file: TrainingFile | None = None
    new_tokens: AddedTokens | None = None
    tokens_before: int | None = 0

    def settled(self, given: Recipe) -> Recipe:
        """The recipe with what it leaves open, and what would change the arithmetic, as the checkpoint settled it."""
        stored = (self.recipe_tree or {}).get("train", {})
        left = (
            {name: stored[name] for name in SETTLED if name in stored and getattr(given.train, name) == "auto"}
            if self.own
            else {}
        )
        return dataclasses.replace(
            given, model=self._stored_model(given), train=dataclasses.replace(given.train, **left)
        )

    @property
    def architecture(self) -> dict[str, Any] | None:
        """The model fields of the weights that training starts with, rows of new tokens included; None for fresh
        ones.
        """
        if self.recipe_tree is None:
            known = self.weights_config
            return with_new_tokens(known, self.new_tokens.ids) if known and self.new_tokens else known
        return {item.name: self.recipe_tree["model"].get(item.name) for item in dataclasses.fields(ModelSection)}

    def _stored_model(self, given: Recipe) -> ModelSection:
        """The recipe's model section with what it leaves open taken from the checkpoint (resolved values are not
        changes).
        """
        if self.recipe_tree is None:
            return given.model
        model = left_to(given, self.architecture or {})
        context = max(self.recipe_tree["model"].get("max_position_embeddings", 0), model.max_position_embeddings or 0)
        return dataclasses.replace(model, max_position_embeddings=context)


def settled_train(recipe: Recipe, start: Start, mesh: Mesh) -> TrainSection:
    """What changes the arithmetic, as the run began. A precision that is still open is the main worker's choice."""
    settled = start.settled(recipe)
    width = settled.model.hidden_size or (start.architecture or {})["hidden_size"]
    precision = mesh.broadcast(resolve_precision(settled.train.precision, mesh.device, width))
    return dataclasses.replace(settled.train, precision=precision)


def find_start(
    run: RunFolder,
    recipe: Recipe,
    resume_from: Path | None,
    log: Callable[[str], None],
    *,
    data_from_start: bool = False,
) -> Start:
    """Decide where the run starts. Damaged checkpoints are passed over by name; a run with none that is whole is an
    error, not a fresh start.

    `data_from_start`: what a `.pt` of the family says of its place in the data is left aside.
    """
    if list_checkpoints(run.path):
        newest = newest_complete(run.path, log)
        if newest is None:
            raise InputError(
                f"{run.path}: none of its checkpoints is complete; restore one, or remove the run to start again"
            )
        if resume_from is not None:
            _check_same_start(newest.path, followed(resume_from))
        return _whole_state(newest.path, own=True)
    if resume_from is not None:
        _check_same_data(recipe, resume_from)
    if resume_from is not None and resume_from.suffix in LEGACY_SUFFIXES:
        path = resume_from.resolve()
        file = read_training_file(path, architecture_fields(recipe.model))
        carried = carried_position(file, recipe, from_start=data_from_start)
        return Start(
            description=f"going on from {path} at step {file.step:,} ({file.tokens:,} tokens); {carried.description}",
            # A window is the recipe's to choose: what the recipe says stays.
            weights_config={
                name: file.fields.get(name) for name in ARCHITECTURE if getattr(recipe.model, name) is None
            },
            progress={"step": file.step},
            data_state=carried.state,
            parent={"run_id": None, "checkpoint": path.name, "step": file.step},
            tokenizer_fingerprint=load_tokenizer(file.tokenizer_folder).fingerprint if file.tokenizer_folder else None,
            family_file=file,
        )
    if data_from_start:
        raise InputError(
            "--data-from-start: is for --resume-from checkpoint_step_<N>.pt; without such a file there is no place in "
            "the data to leave aside"
        )
    if resume_from is not None:
        return _whole_state(followed(resume_from).resolve(), own=False)
    if recipe.model.init_from is None:
        return Start(f"starting from fresh weights (seed {recipe.seed})")
    found = resolve_model(recipe.model.init_from)
    seen = "" if found.tokens is None else f" ({found.tokens:,} tokens)"
    return Start(
        description=f"starting from the weights of {found.folder}{seen}, with a schedule of its own",
        weights=str(found.folder),
        weights_config=found.fields,
        parent={"model": recipe.model.init_from, **identity_of(found)},
        data_state=carried_data(found.data_state, recipe) if found.data_state else None,
        tokenizer_fingerprint=load_tokenizer(found.tokenizer_folder).fingerprint if found.tokenizer_folder else None,
        tokens_before=found.tokens,
    )


def _check_same_start(newest: Path, resume_from: Path) -> None:
    """The command that began this run resumes it; --resume-from of anything else would do nothing here."""
    parent = read_state(newest).get("parent") or {}
    step, run_id = parent.get("step"), parent.get("run_id")
    named = resume_from.resolve().name == parent.get("checkpoint")
    if not named or (run_id is not None and read_state(resume_from.resolve())["run_id"] != run_id):
        begun = f"it began with {parent.get('checkpoint') or parent.get('model')}" if parent else "it began by itself"
        raise InputError(
            f"--resume-from {resume_from}: {newest.parent} exists, and {begun}{f' at step {step}' if step else ''}; "
            "give a new --run, leave --resume-from out to go on, or --rewind N to go back within the run"
        )


def _check_same_data(recipe: Recipe, resume_from: Path) -> None:
    """A whole state goes on in its own kind of data: a place in running text is none among conversations."""
    legacy = resume_from.suffix in LEGACY_SUFFIXES
    stage = "pretrain" if legacy else str(read_state(followed(resume_from).resolve())["recipe"]["stage"])
    if (stage in CHAT_STAGES) != (recipe.stage in CHAT_STAGES):
        weights = f"`argonne import {resume_from} --out DIR`, then --init-from DIR" if legacy else "give --init-from it"
        raise InputError(
            f"--resume-from {resume_from}: is the whole state of a run of stage {stage}, and {recipe.stage} reads "
            f"another kind of data; to start from its weights, {weights}"
        )


def _whole_state(path: Path, *, own: bool) -> Start:
    state = read_state(path)
    if not own and (problems := verify_directory(path)):
        raise InputError(f"{path}: the checkpoint is damaged: {problems[0]}; give another one")
    before = tokens_before(state)
    seen = f"{state['tokens']:,} tokens{f', and {before:,} before step 0' if before else ''}"
    parent = state.get("parent") if own else {"run_id": state["run_id"], "checkpoint": path.name, "step": state["step"]}
    return Start(
        description=f"resuming {path} at step {state['step']:,} ({seen})",
        checkpoint=path,
        own=own,
        progress=state["progress"],
        data_state=state["data"],
        recipe_tree=state["recipe"],
        parent=parent,
        tokenizer_fingerprint=state["tokenizer_fingerprint"],
        tokens_before=before,
    )


def carried_data(state: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The data state of a run that starts at step 0 from weights of another: nothing but where each source stood, so
    that reading goes on there.

    Another order has no common cut with the epoch underway: each source goes on with its next epoch.
    """
    last = state["phases"][-1]
    same = (last["order"], last["documents"], last["seed"]) == (recipe.data.order, recipe.data.documents, recipe.seed)
    places = state["positions"]
    if not same:
        places = {
            name: {"epoch": place["epoch"] + (place["used"] > 0), "piece": 0, "used": 0}
            for name, place in places.items()
        }
    return {**state, "step": 0, "samples": 0, "tokens": 0, "phases": [], "positions": places}


def check_tokenizer(start: Start, tokenizer: TextTokenizer, allow: frozenset[str]) -> None:
    """Refuse data of another tokenizer than the weights were trained with: every id would mean something else. One that
    only adds tokens behind theirs means the same; weights alone get rows for them, a whole state cannot.
    """
    trained, found, added = start.tokenizer_fingerprint, tokenizer.fingerprint, tokenizer.added
    if trained in (None, found) or "data.tokenizer" in allow:
        return
    if added is not None and added.base == trained:
        if start.weights is not None:
            return
        raise InputError(
            f"--resume-from: its weights have no rows for {', '.join(added.names)}, which this stage adds, and its "
            "optimizer no state for them; give the same as --init-from, which takes the weights alone"
        )
    raise InputError(
        f"data: its tokenizer {tokenizer.folder} (fingerprint {found[:12]}) is not the one the weights were trained "
        f"with ({trained[:12]}); prepare the text with the model's own tokenizer, or pass --allow data.tokenizer "
        "where the ids mean the same"
    )


def architecture_fields(model: ModelSection) -> dict[str, Any]:
    """What `config_from_fields` takes: every architecture field that is set."""
    values = {name: getattr(model, name) for name in ARCHITECTURE}
    return {name: value for name, value in values.items() if value is not None}


def build_weights(recipe: Recipe, start: Start) -> Weights:
    """The weights in their training dtype: fresh from the seed, or given ones. A checkpoint is loaded into the model
    afterwards.
    """
    dtype = torch.bfloat16 if recipe.train.precision == "bf16_full" else torch.float32
    try:
        config = config_from_fields(architecture_fields(recipe.model))
    except ValueError as error:
        raise InputError(f"model: {error}") from None
    fresh = fresh_weights(config, initializer=recipe.model.initializer, seed=recipe.seed, dtype=dtype)
    if start.weights is None:
        return fresh
    return started_from(Path(start.weights), fresh, dtype, start.new_tokens.ids if start.new_tokens else range(0))
