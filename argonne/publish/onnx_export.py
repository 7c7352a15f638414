"""`argonne export --as onnx`: the logits of a model as a graph that onnxruntime computes; proven in it."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from argonne import layout
from argonne.errors import InputError
from argonne.files import atomic_directory, write_json
from argonne.model.attention import IMPLEMENTATION
from argonne.model.load import load_model, resolve_model
from argonne.model.modeling_argonne import ArgonneForCausalLM
from argonne.model.save import copy_tokenizer
from argonne.model.stored import check_finite
from argonne.publish.engines import model_card
from argonne.publish.proof import ask, expected_file, is_installed, not_installed, standing
from argonne.publish.source import source_of

TOLERANCE = 1e-5  # of the largest logit
NOTES = [
    "It has one input, `input_ids` (batch, length), and one output, `logits` (batch, length, vocabulary), in fp32. It "
    "has no cache and no mask: put padding behind a text, where no token sees it."
]


def export_onnx(model_path: Path, out: Path, *, engines: Sequence[str] = ()) -> dict[str, Any]:
    """Write MODEL as `out`/model.onnx, with its weights in fp32 beside it, and return what was written and how it was
    proven.

    Where onnxruntime is installed, a fresh process loads the graph before `out` appears, and logits and greedy text are
    compared. Raises InputError for what a graph cannot hold, Mismatch where onnxruntime computes something else.
    """
    if out.exists():
        raise InputError(f"{out} exists already; choose another name or remove it")
    if others := [engine for engine in engines if engine != "onnx"]:
        raise InputError(f"--for {others[0]}: --as onnx is for onnx (onnxruntime) alone; leave it out")
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"--as onnx needs the package {package}, which is not installed; pip install 'argonne[onnx]'"
            )
    loaded = load_model(model_path)
    model, settings = loaded.model, loaded.folder / layout.GENERATION_CONFIG
    model.to(torch.float32)  # type: ignore[arg-type]
    check_rotary(model.config)
    check_finite(model_path, model.state_dict())
    record = {
        "format_version": layout.EXPORT_VERSION,
        "class": "a graph of logits",
        "kind": "onnx",
        "source": source_of(model_path, resolve_model(model_path)),
        "dtype": "float32",
        "parameters": model.num_parameters(),
    }
    with atomic_directory(out) as folder:
        write_onnx(model, folder / layout.ONNX_FILE)
        if settings.is_file():  # the ids that end a text
            (folder / settings.name).write_bytes(settings.read_bytes())
        files = copy_tokenizer(loaded.tokenizer_folder, folder)
        proof: dict[str, Any] = {"proven": False, "why": not_installed("onnx")}
        if is_installed("onnx"):
            with expected_file(model) as expected:
                proof = {"proven": True, **ask("onnx", folder / layout.ONNX_FILE, expected, TOLERANCE)}
        record |= {"engines": {"onnx": standing(proof)._asdict()}, "tokenizer": files, "notes": NOTES, "proof": proof}
        write_json(folder / layout.EXPORT_RECORD, record)
        (folder / layout.MODEL_CARD).write_text(model_card(record))
    return {"path": str(out / layout.ONNX_FILE), **record}


def check_rotary(config: Any) -> None:
    if config.rope_type in ("dynamic", "longrope"):
        raise InputError(
            f"--as onnx: rotary positions of type {config.rope_type} change with the length of a text, and a graph has "
            "those of one length; export it with --as hf"
        )


class Logits(nn.Module):
    """Ids (B, T) to logits (B, T, V): what the graph is made of."""

    def __init__(self, model: ArgonneForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def write_onnx(model: ArgonneForCausalLM, file: Path) -> None:
    """Write the graph of any number of texts of any length, and its weights into a file of their own beside it."""
    ids = torch.zeros(2, min(8, model.config.max_position_embeddings), dtype=torch.int64)
    dynamic = torch.export.Dim.DYNAMIC
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    model.set_attn_implementation("sdpa")
    try:
        exporter.setLevel(logging.ERROR)  # it says of each package that it looked for and did not find
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                Logits(model).eval(),
                (ids,),
                dynamo=True,
                dynamic_shapes={"input_ids": {0: dynamic, 1: dynamic}},
                input_names=["input_ids"],
                output_names=["logits"],
                verbose=False,
            )
        program.save(file, external_data=True)
    finally:
        exporter.setLevel(level)
        model.set_attn_implementation(IMPLEMENTATION)
