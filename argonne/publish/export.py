"""`argonne export`: a model as a folder that others load, proven in a fresh process before it is put in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from argonne import layout
from argonne.errors import InputError
from argonne.files import atomic_directory, read_json, write_json
from argonne.model.load import load_model, no_progress_bar, resolve_model
from argonne.model.save import copy_tokenizer, save_model_folder
from argonne.model.stored import check_finite
from argonne.publish.engines import check_engines, model_card, standings
from argonne.publish.native import Native, native_twin
from argonne.publish.proof import ask_engines, expected_file, prove
from argonne.publish.source import source_of


def export_model(model_path: Path, out: Path, *, kind: str = "hf", engines: Sequence[str] = ()) -> dict[str, Any]:
    """Write MODEL (run, checkpoint, model folder) as the folder `out` and return what was written and how it was
    proven.

    kind "hf": the custom class with its code, for `trust_remote_code=True`. kind "native": GPT-2, Llama, Mistral or
    Gemma 4 where one computes exactly the same. Either is loaded by stock transformers, and by the other engines that
    are here and may compute it, each in a fresh offline process without argonne, and its logits and greedy text are
    compared, before `out` appears. README.md and the record in it say what each engine computes. Raises InputError
    when no native class is exact, or one of `engines` is known to compute something else; Mismatch when it then does.
    """
    if kind not in ("hf", "native"):
        raise InputError(f"--as is {kind!r}; expected hf or native")
    if out.exists():
        raise InputError(f"{out} exists already; choose another name or remove it")
    loaded = load_model(model_path)
    model, settings = loaded.model, loaded.folder / layout.GENERATION_CONFIG
    ids = {f"{name}_id": getattr(model.config, f"{name}_token_id") for name in ("eos", "bos", "pad")}
    native = native_twin(model) if kind == "native" else None
    class_name = type(model).__name__ if native is None else native.model_class.__name__
    found = standings(class_name, model.config)
    check_engines(engines, class_name, found)
    check_finite(model_path, model.state_dict() if native is None else native.state)
    with atomic_directory(out) as folder:
        if native is None:
            save_model_folder(model, folder, **ids)
        else:
            save_native(native, folder, ids, model.dtype)
        if settings.is_file():  # the model's own say more than the ids (temperature, top_p...)
            written = read_json(folder / layout.GENERATION_CONFIG)
            merged = {**read_json(settings), **{name: value for name, value in written.items() if value is not None}}
            write_json(folder / layout.GENERATION_CONFIG, merged)
        files = copy_tokenizer(loaded.tokenizer_folder, folder)
        dtype = str(model.dtype).removeprefix("torch.")
        with expected_file(model) as expected:
            proof = prove(folder, expected)
            proofs = ask_engines(("mlx", "vllm"), found, engines, folder, expected)
        record = {
            "format_version": layout.EXPORT_VERSION,
            "class": proof["class"],
            "kind": kind,
            "source": source_of(model_path, resolve_model(model_path)),
            "dtype": dtype,
            "parameters": model.num_parameters(),
            "engines": {engine: standing._asdict() for engine, standing in found.items()},
            "proof": proof,
            "proofs": proofs,
        }
        write_json(folder / layout.EXPORT_RECORD, record)
        (folder / layout.MODEL_CARD).write_text(model_card(record))
    return {"path": str(out), **record, "tokenizer_files": files}


def save_native(native: Native, folder: Path, ids: dict[str, Any], dtype: torch.dtype) -> None:
    """The native class's own save_pretrained, with ids in the config and the generation config."""
    from transformers import GenerationConfig

    named = {f"{name}_token_id": ids[f"{name}_id"] for name in ("eos", "bos", "pad")}
    for name, value in named.items():
        setattr(native.config, name, value)
    with torch.device("meta"):
        twin = native.model_class(native.config).to(dtype)
    missing, unexpected = twin.load_state_dict(native.state, strict=False, assign=True)
    if missing or unexpected:
        raise RuntimeError(
            f"{native.model_class.__name__}: missing {list(missing)}, unexpected {list(unexpected)}: the name map is "
            "wrong"
        )
    twin.tie_weights()
    twin.generation_config = GenerationConfig(**named)
    with no_progress_bar():
        twin.save_pretrained(folder)
