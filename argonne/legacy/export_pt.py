"""`argonne export --as pt`: a training checkpoint of ours as the family's `checkpoint_step_<N>.pt`, which its trainer
resumes from.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argonne import __version__, layout
from argonne.config import Recipe
from argonne.errors import InputError
from argonne.files import TEMPORARY, fsync_path, read_json, verify_directory, write_json
from argonne.layout import Kind
from argonne.legacy.convert import modern_name
from argonne.legacy.position import WRITTEN_BY
from argonne.legacy.training import CLASSES, HEADS, MOMENTS, class_order
from argonne.model.configuration_argonne import FULL, SLIDING, ArgonneConfig
from argonne.model.load import read_checkpoint_tensors, resolve_model, stop_ids
from argonne.model.save import copy_tokenizer
from argonne.model.stored import check_finite
from argonne.recipe import build
from argonne.report.records import read_metrics
from argonne.train.checkpoint import read_state
from argonne.train.schedule import learning_rate

# What the earlier class fixes: a model that differs cannot be told to it.
FIXED = {
    "position_embedding": "rope",
    "rope_type": "default",
    "norm_type": "rms",
    "hidden_act": "silu",
    "mlp_gated": True,
}
SAME_NAMES = (
    *(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
    ),
    *("max_position_embeddings", "rms_norm_eps", "attention_bias", "mlp_bias", "attention_dropout", "hidden_dropout"),
    *("tie_word_embeddings", "v_norm", "sandwich_norm"),
)


def export_pt(model: Path, out: Path) -> dict[str, Any]:
    """Write `out/checkpoint_step_<N>.pt`, with the model's config.json and tokenizer beside it; the checkpoint appears
    complete or not at all.

    `model`: a run (its newest checkpoint) or a checkpoint. Raises InputError for anything without AdamW's state, or
    that the earlier class has no words for; OSError where it cannot be written.
    """
    checkpoint = _checkpoint_of(model)
    state = read_state(checkpoint)
    recipe = build(Recipe, state["recipe"])
    if recipe.optim.name != "adamw":
        raise InputError(
            f"{checkpoint}: optim.name is {recipe.optim.name}; the .pt format holds AdamW's moments only. `--as hf` "
            "writes the weights"
        )
    config = ArgonneConfig.from_dict(read_json(checkpoint / layout.MODEL_CONFIG))
    legacy = legacy_config(checkpoint, config)
    target = out / f"{layout.checkpoint_name(state['step'])}.pt"
    if target.exists():
        raise InputError(f"{target} exists already; choose another folder or remove it")
    if (out / layout.MODEL_CONFIG).is_file() and read_json(out / layout.MODEL_CONFIG) != legacy:
        raise InputError(f"{out / layout.MODEL_CONFIG}: is the config of another model; choose another folder")
    content = _content(checkpoint, state, recipe, config)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / layout.TOKENIZER).exists():
        (out / layout.TOKENIZER).mkdir()
        copy_tokenizer(checkpoint / layout.TOKENIZER, out / layout.TOKENIZER)
    write_json(out / layout.MODEL_CONFIG, legacy)
    _write(target, content)
    position, messages = content["data_position"], []
    if not isinstance(position, int):
        messages.append(
            "the data of this run is not one file read in order, which a cursor cannot describe: resume from it with "
            "--data-from-start"
        )
    if not recipe.optim.decay_all and recipe.optim.weight_decay:
        messages.append(
            f"one optimizer group: the earlier trainer decays norms and embeddings too, by the "
            f"{recipe.optim.weight_decay:g} that only other matrices had here"
        )
    return {
        "path": str(target),
        "source": str(checkpoint),
        "step": content["global_step"],
        "tokens_processed": content["tokens_processed"],
        "data_position": position,
        "parameters": sum(
            tensor.numel() for name, tensor in content["model_state_dict"].items() if not _is_copy(name, config)
        ),
        "messages": messages,
    }


def _is_copy(name: str, config: ArgonneConfig) -> bool:
    return config.tie_word_embeddings and name in HEADS


def _checkpoint_of(model: Path) -> Path:
    """The training checkpoint that `model` names. A run's final model has no optimizer state: its last
    checkpoint has.
    """
    path = (layout.last_checkpoint(model) if layout.kind_of(model) is Kind.RUN else None) or layout.followed(model)
    if layout.kind_of(path) is not Kind.CHECKPOINT:
        resolve_model(model)  # says what it is not, where it is nothing of ours
        raise InputError(
            f"{model}: has no optimizer state; --as pt takes a run or a checkpoint_step_<N> folder (`--as hf` writes "
            "weights)"
        )
    path = path.resolve()
    if problems := verify_directory(path):
        raise InputError(f"{path}: the checkpoint is damaged: {problems[0]}; give another one")
    return path


def legacy_config(checkpoint: Path, config: ArgonneConfig) -> dict[str, Any]:
    """config.json in the words of the earlier class. Raises InputError naming the field that it cannot express."""
    for name, value in FIXED.items():
        if getattr(config, name) != value:
            raise InputError(
                f"{checkpoint}: {name} is {getattr(config, name)!r}; the class behind these files (2.0 and later) "
                f"knows {value!r} only"
            )
    if config.q_norm != config.k_norm:
        raise InputError(
            f"{checkpoint}: q_norm is {config.q_norm} and k_norm {config.k_norm}; the earlier class has one switch for "
            "both"
        )
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        raise InputError(
            f"{checkpoint}: head_dim is {config.head_dim}; the earlier class takes hidden_size // num_attention_heads "
            f"= {config.hidden_size // config.num_attention_heads}"
        )
    return {
        "model_type": "argonne2",
        **{name: getattr(config, name) for name in SAME_NAMES},
        "rope_theta": (config.rope_parameters or {})["rope_theta"],
        "qk_norm": config.q_norm,
        "logit_softcap": config.final_logit_softcapping or 0.0,
        **_window(checkpoint, config),
        **{name.replace("_id", "_token_id"): value for name, value in stop_ids(checkpoint, config.to_dict()).items()},
    }


def _window(checkpoint: Path, config: ArgonneConfig) -> dict[str, Any]:
    """The window in earlier words: w sees the keys i-w .. i, one more than it says, on odd layers or on all."""
    kinds, count = config.layer_types or [], config.num_hidden_layers
    off = {"interleaved_local_attention": False, "local_attention_window": None, "sliding_window": None}
    if kinds == [FULL] * count:
        return off
    window = int(config.sliding_window or 0) - 1
    if kinds == [SLIDING if layer % 2 else FULL for layer in range(count)] and window > 0:
        return off | {"interleaved_local_attention": True, "local_attention_window": window}
    if kinds == [SLIDING] * count and window > 0:
        return off | {"sliding_window": window}
    raise InputError(
        f"{checkpoint}: layer_types {', '.join(kinds)} with a window of {config.sliding_window}; the earlier class "
        "knows windows of 2 keys or more on odd layers or on all"
    )


def _content(checkpoint: Path, state: dict[str, Any], recipe: Recipe, config: ArgonneConfig) -> dict[str, Any]:
    tensors = read_checkpoint_tensors(checkpoint)
    check_finite(checkpoint, tensors)
    names = _legacy_names(checkpoint, tensors, config)
    weights = {legacy: tensors[f"model.{name}"] for legacy, name in names.items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    # The rate of the next step: the schedule's where the length of the run is known, else the peak.
    manifest, step = checkpoint.parent / layout.MANIFEST, state["step"]
    total = read_json(manifest).get("total_steps") if manifest.is_file() else recipe.train.steps
    rate = learning_rate(step, int(total), recipe.optim, recipe.schedule) if total else recipe.optim.lr
    group, schedule = _group_and_schedule(recipe, rate, step)
    moments = {
        number: {key: tensors[f"optim.{key}.{name}"] for key in ("step", *MOMENTS)}
        for number, name in enumerate(names.values())
    }
    return {
        "global_step": step,
        "tokens_processed": state["tokens"],
        "loss": _loss(checkpoint, step),
        "data_position": None,
        "model_state_dict": weights,
        "optimizer_state_dict": {"state": moments, "param_groups": [{**group, "params": list(range(len(names)))}]},
        "scheduler_state_dict": schedule,
        **_position(state),
        "written_by": WRITTEN_BY,
        "argonne_version": __version__,
    }


def _legacy_names(checkpoint: Path, tensors: dict[str, Tensor], config: ArgonneConfig) -> dict[str, str]:
    """{earlier name: today's} of every parameter, in the order of the earlier class's `parameters()`."""
    block = [f"blocks.{layer}.{part}" for layer in range(config.num_hidden_layers) for part in CLASSES[0][1]]
    every = [f"{module}.{kind}" for module in (*CLASSES[0][0], *block, *CLASSES[0][2]) for kind in ("weight", "bias")]
    known = {name: modern_name(name, config) for name in every if not _is_copy(name, config)}
    names = {name: new for name, new in known.items() if new is not None and f"model.{new}" in tensors}
    left = sorted(
        name for name in tensors if name.startswith("model.") and name.removeprefix("model.") not in names.values()
    )
    frozen = [
        name for name in names.values() if any(f"optim.{key}.{name}" not in tensors for key in ("step", *MOMENTS))
    ]
    if left:
        raise InputError(f"{checkpoint}: {left[0].removeprefix('model.')} has no name in the earlier class")
    if frozen:
        raise InputError(
            f"{checkpoint}: {frozen[0]} has no optimizer state, which the earlier trainer needs for every parameter"
        )
    return {name: names[name] for name in class_order(names, CLASSES[0])}


def _loss(checkpoint: Path, step: int) -> float | None:
    """Loss of the step before the checkpoint, where the run beside it logged one."""
    if not (checkpoint.parent / layout.METRICS).is_file():
        return None
    found = [record["loss"] for record in read_metrics(checkpoint.parent).of("step") if record["step"] == step]
    return float(found[-1]) if found and found[-1] is not None else None


def _group_and_schedule(recipe: Recipe, rate: float, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """AdamW's group and LambdaLR's state as this torch writes them."""
    optim = recipe.optim
    unused = torch.nn.Parameter(torch.zeros(1))
    adamw = torch.optim.AdamW([unused], lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, lambda _: 1.0)
    schedule = scheduler.state_dict() | {"last_epoch": step, "_step_count": step + 1, "_last_lr": [rate]}
    return {**adamw.state_dict()["param_groups"][0], "lr": rate}, schedule


def _position(state: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's cursor and what the family's own trainer keeps beside it; a table of places where one cursor cannot
    tell.
    """
    phases, positions = state["data"]["phases"], state["data"]["positions"]
    last = phases[-1]
    plain = (last["order"], last["documents"]) == ("sequential", "packed") and len(last["sources"]) == 1
    if not plain:
        return {"data_position": {name: f"pass {place['epoch']}, {place['used']}" for name, place in positions.items()}}
    mine = last["sources"][0]["fingerprint"]
    first = next(
        (
            number + 1
            for number in reversed(range(len(phases)))
            if [entry["fingerprint"] for entry in phases[number]["sources"]] != [mine]
        ),
        0,
    )
    before = sum(
        (following["first_step"] - phase["first_step"]) * phase["rows"] * phase["sequence_length"]
        for phase, following in itertools.pairwise(phases[: first + 1])
    )
    return {
        "data_position": positions[mine]["used"],
        "block_size": last["sequence_length"],
        "dataset_fingerprint": mine,
        "dataset_epoch": positions[mine]["epoch"],
        "dataset_base_global_step": phases[first]["first_step"] if first else 0,
        "dataset_base_tokens_processed": before,
    }


def _write(target: Path, content: dict[str, Any]) -> None:
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}")
    needed = 3 * sum(tensor.numel() * tensor.element_size() for tensor in content["model_state_dict"].values())
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        found = torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
        if (
            list(found["model_state_dict"]) != list(content["model_state_dict"])
            or found["global_step"] != content["global_step"]
        ):
            raise OSError(f"{target}: what was written does not read back")
        os.replace(temporary, target)
    except RuntimeError as error:  # torch's own writer, where the disk refuses
        free = shutil.disk_usage(target.parent).free
        raise OSError(
            f"{target}: could not be written ({error}); it takes about {needed:,} bytes, {free:,} are free"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(target.parent)
