"""The family's training checkpoints, `checkpoint_step_<N>.pt`: one pickle with weights, moments and counts, read and
written.

Its optimizer is one AdamW group over `model.parameters()`: the moments carry numbers, not names, in the order in which
that class registered its parameters (`class_order`). Nothing in such a file is ever executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from argonne import layout
from argonne.errors import InputError
from argonne.legacy.convert import modern_config, modern_name, modern_state
from argonne.legacy.reader import LegacyCheckpoint, config_folder, config_of_file, unpickle, weights_of_file
from argonne.model.configuration_argonne import ArgonneConfig
from argonne.model.stored import check_finite
from argonne.train.checkpoint import run_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
_SECOND = (
    *(f"attn.{part}_proj" for part in "qkvo"),
    *("attn.q_norm", "attn.k_norm", "attn.v_norm_layer", "input_norm", "post_norm", "attn_out_norm", "mlp_out_norm"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
_FIRST = ("ln1", "attn.query", "attn.key", "attn.value", "attn.proj", "ln2", "mlp.fc1", "mlp.fc2")
# What each class registers before its blocks, in a block, and after the blocks: 2.0 and later, 1.5, 1.0.
CLASSES = (
    (("embed_tokens",), _SECOND, ("norm", "lm_head")),
    (("position_embedding", "token_embedding"), _FIRST, ("ln_f", "head")),
    (("position_embedding", "token_embedding", "ln_f", "head"), _FIRST, ()),
)
HEADS = ("lm_head.weight", "head.weight")
# Fields that change what the weights compute and leave their shapes alone: a difference here is never intended.
FUNCTION = ("position_embedding", "norm_type", "rms_norm_eps", "hidden_act", "rope_theta", "final_logit_softcapping")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class TrainingFile:
    """A training checkpoint as it lies there. `tensors`: under the earlier names, in the order of the file."""

    path: Path
    step: int
    tokens: int
    content: dict[str, Any]
    tensors: dict[str, Tensor]
    config: ArgonneConfig | None
    messages: list[str]

    @property
    def fields(self) -> dict[str, Any]:
        """The architecture as the recipe's [model] section names it; empty where nothing beside the file tells. The
        vocabulary is the data's.
        """
        if self.config is None:
            return {}
        tree = self.config.to_dict()
        del tree["vocab_size"]
        return {**tree, "rope_theta": _theta(self.config)}

    @property
    def sequence_length(self) -> int | None:
        """Tokens of a row: the earlier trainer made the context just that long."""
        stored = self.content.get("block_size")
        return (
            stored if stored is not None else self.config.max_position_embeddings if self.config is not None else None
        )

    @property
    def tokenizer_folder(self) -> Path | None:
        return layout.tokenizer_of(self.path.parent)


def _theta(config: ArgonneConfig) -> float | None:
    if config.rope_type != "default":
        raise InputError(f"rope_parameters.rope_type is {config.rope_type!r}, and a recipe knows model.rope_theta only")
    return (config.rope_parameters or {}).get("rope_theta")


def class_order(names: Collection[str], kind: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]) -> list[str]:
    """Those of `names` that the class `kind` has, in the order of its `parameters()`."""
    before, block, after = kind
    layers = 1 + max((int(match[1]) for name in names if (match := _BLOCK.match(name))), default=-1)
    modules = [*before, *(f"blocks.{layer}.{part}" for layer in range(layers) for part in block), *after]
    wanted = [name for module in modules for name in (module, f"{module}.weight", f"{module}.bias")]
    return [name for name in wanted if name in names]


def read_training_file(path: Path, given: Mapping[str, Any]) -> TrainingFile:
    """Read a `checkpoint_step_<N>.pt`. `given`: what the recipe says of the model; it must not contradict the config
    beside the file.

    Raises InputError naming the file and what is wrong with it: truncated, not only data, not such a checkpoint, of
    another model.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a checkpoint_step_<N>.pt of the earlier trainer")
    content = unpickle(path)
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: holds a {type(content).__name__}, expected the dictionary that the earlier trainer saved"
        )
    missing = [
        name
        for name in ("global_step", "tokens_processed", "model_state_dict", "optimizer_state_dict")
        if name not in content
    ]
    if missing:
        raise InputError(
            f"{path}: {missing[0]} is missing, so training cannot go on from it; for its weights alone: `argonne "
            f"import {path} --out DIR`, then --init-from DIR"
        )
    step, tokens = content["global_step"], content["tokens_processed"]
    for name, value in (("global_step", step), ("tokens_processed", tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"{path}: {name} is {value!r}, expected a whole number from 0 on")
    if tokens < step:
        raise InputError(
            f"{path}: tokens_processed is {tokens:,}, fewer than the {step:,} steps of global_step; the file "
            "contradicts itself"
        )
    messages: list[str] = []
    tensors = weights_of_file(path, content, messages)
    config = _config_of(path, tensors, given, messages)
    if config is not None:
        _check_function(path, config, given, messages)
    return TrainingFile(path, step, tokens, content, tensors, config, messages)


def _config_of(
    path: Path, tensors: dict[str, Tensor], given: Mapping[str, Any], messages: list[str]
) -> ArgonneConfig | None:
    """The config beside the file; else none where the recipe gives the sizes, or that of the released model of these
    shapes.
    """
    place = config_folder(path)
    if place is None and "hidden_size" in given:
        return None
    legacy = LegacyCheckpoint(place or path, config_of_file(path, tensors, messages), tensors)
    config = modern_config(legacy, "as-config" if given.get("sliding_window") else "full")
    if legacy.messages and "layer_types" not in given:
        messages.append(
            "the config names a window; taken as full attention on every layer, as released weights were trained "
            "(model.layer_types and model.sliding_window say otherwise)"
        )
    return config


def _check_function(path: Path, config: ArgonneConfig, given: Mapping[str, Any], messages: list[str]) -> None:
    """Refuse a recipe under which the same weights would compute something else; a window is the recipe's to choose,
    and is said.
    """
    stored = {name: _theta(config) if name == "rope_theta" else getattr(config, name) for name in FUNCTION}
    for name, value in stored.items():
        if name in given and (given[name] or None) != (value or None) and not (name == "rope_theta" and value is None):
            raise InputError(
                f"{path}: was trained with {name} = {value}, the recipe says model.{name} = {given[name]}; set it to "
                f"{value}"
            )
    wanted = (list(given["layer_types"]), given.get("sliding_window")) if "layer_types" in given else None
    if wanted is not None and wanted != (config.layer_types, config.sliding_window):
        messages.append(
            "the window of the recipe (model.layer_types, model.sliding_window) is another than that of the config; "
            "the recipe's is used"
        )


def parameter_names(file: TrainingFile, *, tied: bool) -> list[str]:
    """Earlier names in the order of the optimizer's numbers, a tied head counted once.

    The file keeps the order of the class that wrote it; one that is in no class's order has been rearranged, and its
    numbers tell nothing.
    """
    found = [name for name in file.tensors if not name.endswith(".attn.mask") and not (tied and name in HEADS)]
    if not any(class_order(set(found), kind) == found for kind in CLASSES):
        raise InputError(
            f"{file.path}: its tensors lie in the order of no earlier class, so its numbered optimizer state cannot be "
            f"matched with them; for its weights alone: `argonne import {file.path} --out DIR`, then --init-from DIR"
        )
    return found


def training_tensors(file: TrainingFile, config: ArgonneConfig) -> dict[str, Tensor]:
    """Everything under today's flat names, `model.<name>` and `optim.<state>.<name>`, padded vocabulary rows trimmed.

    Raises InputError naming file and tensor for what is unknown, missing or mis-shaped.
    """
    weights = modern_state(LegacyCheckpoint(file.path, {}, file.tensors, file.messages), config)
    values = {f"model.{name}": tensor for name, tensor in weights.items()}
    names = parameter_names(file, tied=config.tie_word_embeddings)
    state = _optimizer_state(file, len(names))
    for number, legacy_name in enumerate(names):
        name = modern_name(legacy_name, config)
        assert name is not None  # modern_state has refused unknown names
        entry = state.get(number)
        if not isinstance(entry, dict):
            raise InputError(f"{file.path}: optimizer_state_dict has no state of parameter {number} ({legacy_name})")
        what = f"of parameter {number} ({legacy_name}) is"
        step = torch.tensor(float(entry["step"])) if isinstance(entry.get("step"), int | float) else entry.get("step")
        if not isinstance(step, Tensor) or step.numel() != 1:
            raise InputError(f"{file.path}: optimizer_state_dict: the step {what} {step!r}, expected one number")
        values[f"optim.step.{name}"] = step.reshape(())
        shape = tuple(file.tensors[legacy_name].shape)
        for moment in MOMENTS:
            tensor = entry.get(moment)
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else tensor
            if not isinstance(tensor, Tensor) or found != shape:
                raise InputError(f"{file.path}: optimizer_state_dict: {moment} {what} {found}, expected shape {shape}")
            values[f"optim.{moment}.{name}"] = (
                tensor.reshape(-1, *tensor.shape[-1:])[: len(weights[name])] if tensor.dim() > 1 else tensor
            )
    check_finite(file.path, values)
    return values


def _optimizer_state(file: TrainingFile, count: int) -> dict[Any, Any]:
    """The numbered state of one AdamW group over `count` parameters."""
    optimizer = file.content["optimizer_state_dict"]
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(optimizer.get("state"), dict):
        found = f"{len(groups)} groups" if isinstance(groups, list) else "none"
        raise InputError(
            f"{file.path}: optimizer_state_dict: expected the state of AdamW with one parameter group, found {found}"
        )
    numbers = groups[0].get("params")
    if numbers != list(range(count)):
        found = f"{len(numbers)} parameters" if isinstance(numbers, list) else repr(numbers)
        raise InputError(
            f"{file.path}: optimizer_state_dict: expected the state of this model's {count} parameters, found {found}"
        )
    if groups[0].get("amsgrad") or "betas" not in groups[0]:
        raise InputError(
            f"{file.path}: optimizer_state_dict: expected AdamW without amsgrad, found a group of {sorted(groups[0])}"
        )
    state: dict[Any, Any] = optimizer["state"]
    return state


def restore(file: TrainingFile, model: nn.Module, optimizer: torch.optim.Optimizer, log: Callable[[str], None]) -> None:
    """Fill the model and AdamW of a run from the file, all or nothing; say what was trimmed and what of the optimizer's
    settings differs.

    What was read is let go: a file of the old, unmapped format lies in memory whole.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    wanted = run_tensors(model, optimizer)
    if any(name.startswith("optim.momentum.") for name in wanted):
        raise InputError(
            f"{file.path}: holds AdamW's moments, but optim.name is muon; set optim.name = adamw, or start from its "
            "weights alone"
        )
    config: Any = model.config
    values = training_tensors(file, config)
    for name, target in wanted.items():
        if name not in values or values[name].shape != target.shape:
            found = f"shape {tuple(values[name].shape)}" if name in values else "nothing"
            raise InputError(f"{file.path}: found {found} for {name}, expected shape {tuple(target.shape)}")
    with torch.no_grad():
        for name, target in wanted.items():
            value = values[name]
            if isinstance(target, DTensor):  # sharded: this rank's part of the whole
                value = distribute_tensor(
                    value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
                )
            target.copy_(value)
    for message in [*file.messages, *_differences(file, optimizer)]:
        log(message)
    file.tensors.clear()
    file.content.clear()


def _differences(file: TrainingFile, optimizer: torch.optim.Optimizer) -> list[str]:
    """Settings of the earlier optimizer that the recipe changes. The rate is the schedule's and needs no word."""
    stored, live = file.content["optimizer_state_dict"]["param_groups"][0], optimizer.param_groups
    pairs = {name: (stored.get(name), live[0][name]) for name in ("betas", "eps")}
    found = [f"optim.{name}: {old} -> {new}" for name, (old, new) in pairs.items() if old != new]
    kinds = {tensor.dtype for name, tensor in file.tensors.items() if not name.endswith(".attn.mask")}
    if kinds != {parameter.dtype for group in live for parameter in group["params"]}:
        found.append(f"weights: stored as {', '.join(sorted(map(str, kinds)))}")
    decays = {group["weight_decay"] for group in live}
    if decays != {stored.get("weight_decay")}:
        found.append(
            f"optim.weight_decay: {stored.get('weight_decay')} on all -> "
            f"{' and '.join(f'{value:g}' for value in sorted(decays))}"
        )
    return [f"changed since the checkpoint: {text}" for text in found]
