"""Find and load a MODEL: a run, a checkpoint, an exported folder, or a Hub id of this family. Nothing else is ever run
or unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from argonne import layout
from argonne.errors import InputError, first_line
from argonne.layout import Kind
from argonne.model.build import Weights, empty_model
from argonne.model.configuration_argonne import Argonne1Config, ArgonneConfig
from argonne.model.modeling_argonne import ArgonneForCausalLM
from argonne.model.stored import StoredTensors, fingerprint_of_weights
from argonne.plan.shape import architecture_of
from argonne.tokens.tokenizer import TURN_ENDS, document_end, named_tokens

FAMILY = ("argonne", "argonne2")
VOCABULARY_TABLES = ("model.embed_tokens.", "lm_head.")  # what has a row for each token


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for each load and save, into the middle of other lines: leave it out while the block
    runs.
    """
    from transformers.utils import logging

    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bar:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class FoundModel:
    """Where a model's weights lie and what is known of them without reading them. `data_state`: where the data of its
    run stood. `tokens`: that they were trained on, their ancestors' included; None where nothing tells.
    """

    folder: Path
    config: dict[str, Any]
    tokenizer_folder: Path | None
    is_checkpoint: bool = False
    run_id: str | None = None
    step: int | None = None
    data_state: dict[str, Any] | None = None
    tokens: int | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The architecture as the recipe's [model] section names it. Raises InputError for what it has no words for."""
        return architecture_of(self.config, self.folder)


@dataclass(frozen=True)
class LoadedModel:
    model: ArgonneForCausalLM
    tokenizer_folder: Path | None
    folder: Path


def identity_of(found: FoundModel) -> dict[str, Any]:
    """What a run or a merge writes down of a model that it begins with."""
    return {"run_id": found.run_id, "step": found.step, "weights": fingerprint_of_weights(found.folder)}


def resolve_model(name: str | Path) -> FoundModel:
    """The folder behind a MODEL argument. Raises InputError saying what was found and what would do."""
    path = layout.followed(Path(name).expanduser())
    if not path.exists():
        return _from_hub(str(name))
    if not path.is_dir():
        raise InputError(
            f"{path}: is a file; expected a run, a checkpoint or a model folder (a .pt checkpoint: `argonne import "
            f"{path} --out DIR`)"
        )
    kind, folder = layout.kind_of(path), path
    if kind is Kind.RUN:
        model = layout.model_of_run(path)
        if model is None:
            raise InputError(f"{path}: the run has no checkpoint yet; let it train to its first save")
        kind, folder = layout.kind_of(model), model
    if kind is Kind.CHECKPOINT:
        return _checkpoint(folder.resolve())
    if kind in (Kind.MODEL_FOLDER, Kind.LEGACY_FOLDER):
        last = layout.last_checkpoint(path)  # of a run: its final model does not say where its data stood
        state = _json(last / layout.STATE) if last is not None else {}
        where = layout.tokenizer_of(folder)
        return FoundModel(folder, family_config(folder), where, False, **_lineage(state))
    if kind is not Kind.NOTHING:
        raise InputError(f"{path}: is {kind.value}; expected a run, a checkpoint or a model folder")
    raise InputError(
        f"{path}: neither a run, a checkpoint nor a model folder (no manifest.json, state.json or config.json in it)"
    )


def _checkpoint(path: Path) -> FoundModel:
    from argonne.files import verify_directory

    if problems := verify_directory(path):
        raise InputError(f"{path}: the checkpoint is damaged: {problems[0]}; give another one")
    state = _json(path / layout.STATE)
    if state.get("format_version") != layout.STATE_VERSION:
        raise InputError(
            f"{path / layout.STATE}: format version {state.get('format_version')!r}, this argonne reads "
            f"{layout.STATE_VERSION}; update argonne"
        )
    return FoundModel(path, family_config(path), path / layout.TOKENIZER, True, **_lineage(state))


def tokens_before(state: dict[str, Any]) -> int | None:
    """Tokens that the weights of a state.json, and their ancestors', were trained on before its own count began. None
    where nothing tells: earlier ones do not, where they have a parent.
    """
    found: int | None = state.get("tokens_before", None if state.get("parent") else 0)
    return found


def _lineage(state: dict[str, Any]) -> dict[str, Any]:
    """What a state.json says of where weights come from; nothing where there is none."""
    before, own = tokens_before(state), state.get("tokens")
    tokens = None if before is None or own is None else before + own
    return {"run_id": state.get("run_id"), "step": state.get("step"), "data_state": state.get("data"), "tokens": tokens}


def _from_hub(name: str) -> FoundModel:
    layout.check_model_name(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        # The configuration first: another family is refused before its weights are fetched.
        folder = Path(snapshot_download(name, allow_patterns=[layout.MODEL_CONFIG]))
        family_config(folder)
        folder = Path(snapshot_download(name, allow_patterns=["*.json", layout.WEIGHTS, "*.jinja", "*.txt"]))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{name}: no such folder here, and the Hub did not give it ({first_line(error)}); download it and give the "
            "folder"
        ) from None
    return FoundModel(folder, family_config(folder), layout.tokenizer_of(folder))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def family_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder. Raises InputError for a model of another family, by its name."""
    config = _json(folder / layout.MODEL_CONFIG)
    kind = config.get("model_type")
    if kind not in FAMILY:
        raise InputError(
            f"{folder}: a model of another family: model_type is {kind!r} "
            f"({', '.join(config.get('architectures') or ['no class named'])}); expected one of Argonne's "
            f"({' or '.join(FAMILY)})"
        )
    return config


def load_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Load a MODEL for inference, in eval mode. `dtype` None keeps the stored one. Raises InputError for anything that
    is not such a model.
    """
    found = resolve_model(name)
    weights = stored_weights(found.folder, dtype)
    model = weights.fill(device)
    generation = found.folder / layout.GENERATION_CONFIG
    if generation.is_file():
        model.generation_config = GenerationConfig.from_dict(_json(generation))
    for name, value in stop_ids(found.folder, found.config).items():
        for keeper in (model.config, model.generation_config):  # so that save_pretrained keeps them
            setattr(keeper, name.replace("_id", "_token_id"), value)
    return LoadedModel(model.eval(), found.tokenizer_folder, found.folder)


def stop_ids(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """eos, bos and pad ids: each of generation_config.json, else of the config, else of the tokenizer's own token."""
    path = folder / layout.GENERATION_CONFIG
    chosen = json.loads(path.read_text()) if path.is_file() else {}
    known = {**config, **{name: value for name, value in chosen.items() if value is not None}}
    found: dict[str, Any] = {f"{name}_id": known.get(f"{name}_token_id") for name in ("eos", "bos", "pad")}
    source = layout.tokenizer_of(folder) or folder
    tokenizer = source / layout.TOKENIZER_FILE
    if None in found.values() and tokenizer.is_file():
        from tokenizers import Tokenizer

        words, said = Tokenizer.from_file(str(tokenizer)), named_tokens(source)
        for name in (name for name, value in found.items() if value is None):
            token = said.get(name.replace("_id", "_token"))
            token = token.get("content") if isinstance(token, dict) else token
            found[name] = words.token_to_id(token) if token else None
            if name == "eos_id" and token in TURN_ENDS and (end := document_end(token, words.token_to_id)[0]) != token:
                found[name] = [found[name], words.token_to_id(str(end))]
    return found


def stored_weights(folder: Path, dtype: torch.dtype | None = None) -> Weights:
    """The model of a checkpoint or model folder. `dtype` None: as its config says, else as they are stored. Raises
    InputError where they are not those of the config.
    """
    stored, config = tensors_of(folder), _config(folder)
    model = empty_model(config)
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    problems = [f"{name} is missing" for name in sorted(own.keys() - stored.shapes.keys())]
    problems += [f"{name} is unknown" for name in sorted(stored.shapes.keys() - own.keys() - tied)]
    problems += [
        f"{name} has shape {stored.shapes[name]}, expected {shape}"
        for name, shape in sorted(own.items())
        if stored.shapes.get(name, shape) != shape
    ]
    if problems:
        raise InputError(
            f"{folder}: not the weights of this configuration: {'; '.join(problems[:3])} ({len(problems)} differences)"
        )
    said = getattr(torch, str(config.dtype).removeprefix("torch."), None) if config.dtype else None
    wanted = dtype or said or stored.read(next(iter(own))).dtype
    config.dtype = wanted
    return Weights(model, lambda: ((name, stored.read(name).to(wanted)) for name in sorted(own)))


def _config(folder: Path) -> ArgonneConfig:
    values = _json(folder / layout.MODEL_CONFIG)
    try:
        return (Argonne1Config if values["model_type"] == "argonne" else ArgonneConfig).from_dict(values)
    except ValueError as error:
        raise InputError(f"{folder / layout.MODEL_CONFIG}: {error}") from None


def tensors_of(folder: Path) -> StoredTensors:
    """The weights of a checkpoint or model folder by parameter name. Raises InputError where it has none that fit
    ours.
    """
    if layout.kind_of(folder) is Kind.CHECKPOINT:
        stored = StoredTensors(folder, "model.")
        if not stored.shapes:
            raise InputError(f"{folder}: no weights in it")
        return stored
    if not any(folder.glob(layout.WEIGHTS)):
        raise InputError(
            f"{folder}: no safetensors file; earlier formats come in through `argonne import {folder} --out DIR`"
        )
    stored = StoredTensors(folder)
    if any(name.startswith("model.model.") for name in stored.shapes):
        raise InputError(
            f"{folder}: the tensors of a training checkpoint, but its state.json is missing; it is damaged, give "
            "another one"
        )
    if layout.kind_of(folder) is Kind.LEGACY_FOLDER:
        raise InputError(
            f"{folder}: tensors under earlier names; run `argonne import {folder} --out DIR` and use that folder"
        )
    return stored


def read_checkpoint_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a training checkpoint by their flat names, however many ranks wrote it."""
    stored = StoredTensors(checkpoint)
    return {name: stored.read(name) for name in stored.shapes}


def started_from(folder: Path, fresh: Weights, dtype: torch.dtype, new_ids: range = range(0)) -> Weights:
    """The model of `fresh` with the weights of a checkpoint or model folder of the same architecture. A longer learned
    position table is refused.

    new_ids: tokens that the weights never saw. Their rows of the embedding, and of a head of its own, which are missing
    or spare in the weights, become the mean of the rows before them.
    """
    stored, own = tensors_of(folder), dict(fresh.model.named_parameters())
    growing = {name for name in own if new_ids and name.startswith(VOCABULARY_TABLES)}
    problems = [
        f"{name} is {stored.shapes.get(name, 'missing')}, expected {tuple(parameter.shape)}"
        for name, parameter in own.items()
        if name not in stored.shapes
        or stored.shapes[name][name in growing :] != parameter.shape[name in growing :]
        or (name in growing and not new_ids.start <= stored.shapes[name][0] <= len(parameter))
    ]
    if problems:
        raise InputError(
            f"{folder}: its weights do not fit this model: {'; '.join(problems[:3])} ({len(problems)} differences)"
        )

    def grown(name: str, table: torch.Tensor) -> torch.Tensor:
        known = stored.read(name)
        table[: len(known)] = known
        # Spare rows of the weights too: no text ever asked for them. In an embedding they are the noise of the first
        # step, in a head, or one table for both, pushed away from every answer since: an average token begins better.
        table[new_ids.start : new_ids.stop] = mean_row(known[: new_ids.start])
        return table

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        if not growing:
            yield from ((name, stored.read(name).to(dtype)) for name in sorted(own))
            return
        for name, tensor in fresh.tensors():
            yield name, grown(name, tensor) if name in growing else stored.read(name).to(dtype)

    return Weights(fresh.model, tensors)


def mean_row(table: torch.Tensor) -> torch.Tensor:
    """The mean of the rows in float64, without a copy of the whole table in it."""
    return torch.stack([part.double().sum(0) for part in table.split(4096)]).sum(0) / len(table)
