"""Read checkpoints of earlier Argonne code: folders and `.pt` training checkpoints. Nothing in them is
ever executed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argonne import layout
from argonne.errors import InputError, first_line
from argonne.model.load import family_config
from argonne.presets import presets

_STAGE = re.compile(r"pipeline_stages\.(\d+)\.(\d+)\.(.+)")


@dataclass
class LegacyCheckpoint:
    """An earlier checkpoint as it lies there: its config file, its tensors under their earlier names, and what was
    remarkable.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    messages: list[str] = field(default_factory=list)


def read_legacy(path: Path) -> LegacyCheckpoint:
    """Read a folder (config.json with safetensors or pytorch_model.bin) or a `checkpoint_step_<N>.pt`. Raises
    InputError by file and cause.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give a checkpoint of earlier Argonne code")
    messages: list[str] = []
    if path.is_dir():
        if not (path / layout.MODEL_CONFIG).is_file():
            raise InputError(f"{path / layout.MODEL_CONFIG}: no such file; an earlier checkpoint needs its config.json")
        config = family_config(path)
        return LegacyCheckpoint(path, config, _plain(path, _read_folder(path), messages), messages)
    content = unpickle(path)
    if isinstance(content, dict) and "model_state_dict" in content:
        step, tokens = content.get("global_step"), content.get("tokens_processed")
        messages.append(
            f"{path.name}: training checkpoint of step {step}, {tokens} tokens; optimizer and schedule are left behind"
        )
    tensors = weights_of_file(path, content, messages)
    return LegacyCheckpoint(path.parent, config_of_file(path, tensors, messages), tensors, messages)


def weights_of_file(path: Path, content: Any, messages: list[str]) -> dict[str, Tensor]:
    """The weights in what `unpickle` gave, under the names and in the order of the earlier class. Raises InputError."""
    return _plain(path, _weights_in(path, content), messages)


def _plain(path: Path, stored: dict[str, Tensor], messages: list[str]) -> dict[str, Tensor]:
    """Names as the plain module has them: torch.compile and DDP put prefixes in front of and between the parts."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        plain = ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))
        if plain in tensors and not torch.equal(tensors[plain], tensor):
            raise InputError(
                f"{name}: another tensor of the same name without its prefix has other values; the checkpoint "
                "contradicts itself"
            )
        tensors[plain] = tensor
    _unfold_pipeline(path, tensors, messages)
    if any(name.startswith("model.layers.") for name in tensors):
        raise InputError(
            f"{path}: its tensors have today's names already; use the folder as it is, nothing needs importing"
        )
    if not any(name.startswith("blocks.") for name in tensors):
        found = ", ".join(list(tensors)[:3]) or "none"
        raise InputError(f"{path}: not an Argonne checkpoint: expected tensors named blocks.0..., found {found}")
    return tensors


def _read_folder(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            part = load_file(path) if path.suffix == ".safetensors" else _weights_in(path, unpickle(path))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: cannot be read as safetensors ({error}); it is truncated or damaged, copy it again"
            ) from None
        for name in part.keys() & tensors.keys():
            raise InputError(f"{path}: {name} is in an earlier file of this folder too; keep one set of weights")
        tensors.update(part)
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """The weights of a folder: what an index file names, else the usual file names, else the only file of a kind.

    A missing shard of an index is named here, not found out later as missing tensors.
    """
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if not index.is_file():
            continue
        try:
            wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{index}: cannot be read as a weight index ({error!r})") from None
        for name in wanted:
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"{folder}: {name} is missing; {index.name} names {len(wanted)} files")
        return [folder / name for name in wanted]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
    for pattern in (layout.WEIGHTS, *layout.LEGACY_WEIGHTS):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found
        if found:
            raise InputError(
                f"{folder}: {len(found)} files {pattern} and none is model.safetensors; give the one that you mean"
            )
    raise InputError(f"{folder}: no weights in it; expected model.safetensors or pytorch_model.bin")


def unpickle(path: Path) -> Any:
    """What a PyTorch file holds, mapped into memory where its format allows; nothing in it is executed. Raises
    InputError naming the cause.

    Beside tensors and plain values numpy numbers are let in: earlier trainers stored their mean loss and cosine rates
    as such.
    """
    import pickle

    import numpy

    scalar = numpy.float64(0).__reduce__()[0]
    named = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    numbers: list[Any] = [numpy.dtype, numpy.dtypes.Float64DType, *named]
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        with torch.serialization.safe_globals(numbers):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        told = [line.strip() for line in str(error).splitlines() if "Unsupported" in line]
        reason = told[0] if told else first_line(error)
        raise InputError(
            f"{path}: holds more than tensors and was not loaded, because loading it would run its code ({reason})"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as a PyTorch file ({first_line(error)}); it is truncated or damaged, copy it again"
        ) from None


def _weights_in(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict in a loaded pickle: itself, or under model_state_dict."""
    state = content
    if isinstance(content, dict) and "model_state_dict" in content:
        state = content["model_state_dict"]
        if content.get("tensor_parallel") and content.get("world_size", 1) > 1:
            raise InputError(
                f"{path}: holds one of {content['world_size']} tensor-parallel shards (rank {content.get('rank', 0)}); "
                "the others were never saved"
            )
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: no state dict in it; expected tensors by name, perhaps under model_state_dict")
    return dict(state)


def _unfold_pipeline(path: Path, tensors: dict[str, Tensor], messages: list[str]) -> None:
    """pipeline_stages.{s}.{j}.* is layer s * blocks_per_stage + j; it may repeat blocks.*, and must
    then agree with it.
    """
    matches = {name: match for name in tensors if (match := _STAGE.fullmatch(name))}
    if not matches:
        return
    per_stage = 1 + max(int(match[2]) for match in matches.values())
    repeated = 0
    for name, match in matches.items():
        layer = int(match[1]) * per_stage + int(match[2])
        plain, tensor = f"blocks.{layer}.{match[3]}", tensors.pop(name)
        if plain not in tensors:
            tensors[plain] = tensor
        elif torch.equal(tensors[plain], tensor):
            repeated += 1
        else:
            raise InputError(
                f"{path}: {name} and {plain} are the same parameter with different values; the checkpoint contradicts "
                "itself"
            )
    messages.append(
        f"pipelined checkpoint: {len(matches)} stage tensors, {per_stage} blocks a stage, {repeated} of them repeats"
    )


def config_folder(path: Path) -> Path | None:
    """Where the config of a `.pt` lies, if it does: beside it, or a folder up."""
    return next(
        (folder for folder in (path.parent, path.parent.parent) if (folder / layout.MODEL_CONFIG).is_file()), None
    )


def config_of_file(path: Path, tensors: dict[str, Tensor], messages: list[str]) -> dict[str, Any]:
    """The config that lies beside a `.pt`, or that of the released model whose shapes these are."""
    if folder := config_folder(path):
        return family_config(folder)
    fitting = [name for name, preset in presets().items() if _shapes_fit(preset.fields, tensors)]
    if len(fitting) != 1:
        what = f"fits {' and '.join(fitting)}" if fitting else "is the shape of no released model"
        raise InputError(
            f"{path}: a training checkpoint has no config, and it {what}; put the config.json of the model beside it"
        )
    messages.append(f"no config.json beside {path.name}: its shapes are those of {fitting[0]}")
    fields = presets()[fitting[0]].fields
    kind = "argonne" if fields["position_embedding"] == "learned" else "argonne2"
    return {"model_type": kind, **{name: value for name, value in fields.items() if value is not None}}


def _shapes_fit(fields: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    first = fields["position_embedding"] == "learned"
    names = ("blocks.0.mlp.up_proj", "blocks.0.attn.q_proj", "embed_tokens")
    names = ("blocks.0.mlp.fc1", "blocks.0.attn.query", "token_embedding") if first else names
    up, query, table = (tensors.get(f"{name}.weight") for name in names)
    if up is None or query is None or table is None or layers != fields["num_hidden_layers"]:
        return False
    untied = first or not torch.equal(tensors.get("lm_head.weight", table), table)
    return (
        tuple(up.shape) == (fields["intermediate_size"], fields["hidden_size"])
        and query.shape[0] == fields["num_attention_heads"] * fields["head_dim"]
        and fields["vocab_size"] <= table.shape[0] < fields["vocab_size"] + 512
        and fields["sandwich_norm"] == ("blocks.0.attn_out_norm.weight" in tensors)
        and fields["tie_word_embeddings"] != untied
    )
