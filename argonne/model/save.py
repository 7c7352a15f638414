"""A complete Hugging Face folder of the custom class: weights, config with a whole auto_map, generation config and the
model's own code.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from argonne import layout


def save_model_folder(
    model: Any,
    folder: Path,
    *,
    eos_id: int | list[int] | None,
    bos_id: int | None = None,
    pad_id: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `model` into an existing folder so that `from_pretrained(folder, trust_remote_code=True)` works where
    argonne is not installed.

    `dtype`: cast floating-point weights while writing; the model itself is left as it is.
    """
    from transformers import GenerationConfig

    from argonne.model.load import no_progress_bar

    state = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    first_eos = eos_id[0] if isinstance(eos_id, list) else eos_id
    ids = {"eos_token_id": eos_id, "bos_token_id": bos_id, "pad_token_id": pad_id if pad_id is not None else first_eos}
    before = {name: getattr(model.config, name, None) for name in ids}
    for name, value in ids.items():
        setattr(model.config, name, value)
    try:
        model.generation_config = GenerationConfig(**ids)
        type(model.config).register_for_auto_class()
        type(model).register_for_auto_class("AutoModelForCausalLM")
        with no_progress_bar():
            model.save_pretrained(folder, state_dict=state)
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
    # save_pretrained records the saved class only: name the others too, so that every Auto class finds its own.
    path = folder / layout.MODEL_CONFIG
    config = json.loads(path.read_text())
    config["architectures"] = [f"{family_of(type(model.config))}ForCausalLM"]
    config["auto_map"] = auto_map(type(model.config))
    config["dtype"] = str(dtype or next(model.parameters()).dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")


def family_of(config_class: type) -> str:
    """Argonne, or Argonne1 for 1.x."""
    return config_class.__name__.removesuffix("Config")


def auto_map(config_class: type) -> dict[str, str]:
    """Which class each Auto class is to find."""
    family = family_of(config_class)
    return {
        "AutoConfig": f"configuration_argonne.{config_class.__name__}",
        "AutoModel": f"modeling_argonne.{family}BaseModel",
        "AutoModelForCausalLM": f"modeling_argonne.{family}ForCausalLM",
        "AutoModelForSequenceClassification": f"modeling_argonne.{family}ForSequenceClassification",
    }


def shipped_code(model_class: type) -> set[str]:
    """Names of the files of code that a model folder needs."""
    from transformers.dynamic_module_utils import get_relative_import_files

    file = inspect.getfile(model_class)
    return {Path(name).name for name in (file, *get_relative_import_files(file))}


def copy_tokenizer(source: Path | None, target: Path) -> list[str]:
    """Copy the tokenizer files and the chat template; return their names."""
    if source is None:
        return []
    found = [name for name in layout.TOKENIZER_FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found
