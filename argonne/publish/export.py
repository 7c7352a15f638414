"""`argonne export`: a model as a folder that others load, proven in a fresh process before it is put in place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argonne import layout
from argonne.errors import InputError
from argonne.files import atomic_directory, read_json, write_json
from argonne.model.load import load_model, no_progress_bar
from argonne.model.modeling_argonne import ArgonneForCausalLM
from argonne.model.save import check_finite, copy_tokenizer, save_model_folder
from argonne.publish.engines import check_engines, model_card, standings
from argonne.publish.native import Native, native_twin

TOLERANCE = 1e-4  # of the largest logit
GREEDY_TOKENS = 16


def export_model(model_path: Path, out: Path, *, kind: str = "hf", engines: Sequence[str] = ()) -> dict[str, Any]:
    """Write MODEL (run, checkpoint, model folder) as the folder `out` and return what was written and how it was
    proven.

    kind "hf": the custom class with its code, for `trust_remote_code=True`. kind "native": GPT-2, Llama, Mistral or
    Gemma 4 where one computes exactly the same. Either is loaded by stock transformers in a fresh offline process
    without argonne, and its logits and greedy text are compared, before `out` appears. README.md and the record in it
    say what each engine computes. Raises InputError when no native class is exact, or when one of `engines` is known to
    compute something else.
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
        about = {
            "kind": kind,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": model.num_parameters(),
            "engines": {engine: standing._asdict() for engine, standing in found.items()},
        }
        proof = prove(folder, model)
        record = {"format_version": layout.EXPORT_VERSION, "class": proof["class"], **about, "proof": proof}
        write_json(folder / layout.EXPORT_RECORD, record)
        (folder / layout.MODEL_CARD).write_text(model_card(record))
    return {"path": str(out), "source": str(model_path), **record, "tokenizer_files": files}


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


@torch.no_grad()
def expectations(model: ArgonneForCausalLM) -> dict[str, Tensor]:
    """What the exported folder must reproduce in fp32: logits beyond any window, and greedy text."""
    config = model.config
    length = min(config.max_position_embeddings, 2 * (config.sliding_window or 0) + 48)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, length), generator=generator)
    single = model.to(torch.float32)  # type: ignore[arg-type]
    prompt = max(1, min(8, length - GREEDY_TOKENS))
    new = min(GREEDY_TOKENS, length - prompt)
    greedy = single.generate(ids[:, :prompt], max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    logits = single(input_ids=ids, use_cache=False).logits
    return {
        "input_ids": ids,
        "logits": logits.contiguous(),
        "greedy_ids": greedy.contiguous(),
        "prompt_length": torch.tensor(prompt),
    }


def prove(folder: Path, model: ArgonneForCausalLM) -> dict[str, Any]:
    """Load the folder in a fresh process and compare. Raises RuntimeError when anything differs: then nothing is put in
    place.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="argonne-proof-") as scratch:
        expected = Path(scratch) / "expected.safetensors"
        save_file(expectations(model), expected)
        found = run_fresh(folder, expected, Path(scratch))
    what = {
        "relative_difference": "logits differ",
        "loss_difference": "outputs[0] of a call with labels is not their loss: it differs",
        "second_difference": "a second copy in the process computes something else: logits differ",
        "greedy_gap": "greedy text differs where the two best logits are apart",
        "static_gap": "greedy text with a static cache differs where the two best logits are apart",
    }
    for name, fault in what.items():
        if not found[name] <= TOLERANCE:  # so that NaN fails
            raise RuntimeError(f"{folder}: {fault} by {found[name]:.1e} of the largest, allowed {TOLERANCE:.0e}")
    return found


def run_fresh(folder: Path, expected: Path, scratch: Path) -> dict[str, Any]:
    """fresh_load.py in a process of its own: offline, with an empty cache of remote code, where argonne cannot be
    imported.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_MODULES_CACHE": str(scratch / "modules"),
    }
    command = [sys.executable, str(Path(__file__).with_name("fresh_load.py")), str(folder.resolve()), str(expected)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("@@")]
    if done.returncode or not lines:
        raise RuntimeError(
            f"{folder}: does not load in a fresh process: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
        )
    result: dict[str, Any] = json.loads(lines[-1][2:])
    return result
