"""An artifact asked of the engine that will read it: in a fresh process, offline and without argonne, its logits and
greedy text are compared with the model's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from argonne.errors import InputError
from argonne.model.modeling_argonne import ArgonneForCausalLM
from argonne.publish.engines import DIFFERENT, EXACT, ROUNDED, UNPROVEN, Standing

TOLERANCE = 1e-4  # of the largest logit
GREEDY_TOKENS = 64
EXPECTED = "expected.safetensors"


class Driver(NamedTuple):
    """How an engine is asked: the module that must be there, what installs it, the script of this room that runs it."""

    module: str
    install: str
    script: str = "fresh_engine.py"


DRIVERS = {
    "transformers": Driver("transformers", "transformers", "fresh_load.py"),
    "llama.cpp": Driver("llama_cpp", "llama-cpp-python", "fresh_llama_cpp.py"),
    "mlx": Driver("mlx_lm", "mlx-lm 'mlx[cpu]'"),
    "onnx": Driver("onnxruntime", "onnxruntime"),
    "vllm": Driver("vllm", "vllm"),
}
ON_REQUEST = ("vllm",)  # it takes a GPU and minutes: asked where --for names it


class Mismatch(InputError, RuntimeError):
    """An engine computes something else from an artifact, or does not load it: then nothing is put in place."""


def is_installed(engine: str) -> bool:
    return importlib.util.find_spec(DRIVERS[engine].module) is not None


def not_installed(engine: str) -> str:
    return f"not proven in {engine}: it is not installed (pip install {DRIVERS[engine].install})"


@torch.no_grad()
def expectations(model: ArgonneForCausalLM, greedy_tokens: int = GREEDY_TOKENS) -> dict[str, Tensor]:
    """What the export must reproduce in fp32: logits beyond any window, and greedy text. The model is fp32 afterwards,
    and its generation settings are gone: greedy text may hold any id.
    """
    from transformers import GenerationConfig

    config = model.config
    length = min(config.max_position_embeddings, 2 * (config.sliding_window or 0) + 32 + greedy_tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, length), generator=generator)
    single = model.to(torch.float32)  # type: ignore[arg-type]
    single.generation_config = GenerationConfig()
    prompt = max(1, min(8, length - greedy_tokens))
    new = min(greedy_tokens, length - prompt)
    greedy = single.generate(ids[:, :prompt], max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    logits = single(input_ids=ids, use_cache=False).logits
    return {
        "input_ids": ids,
        "logits": logits.contiguous(),
        "greedy_ids": greedy.contiguous(),
        "prompt_length": torch.tensor(prompt),
    }


@contextmanager
def expected_file(model: ArgonneForCausalLM, about: dict[str, Any] | None = None) -> Iterator[Path]:
    """The expectations of `model` in a scratch folder, and `about` as JSON beside them."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="argonne-proof-") as scratch:
        expected = Path(scratch) / EXPECTED
        save_file(expectations(model), expected)
        del model  # an engine may need its room
        if about is not None:
            expected.with_suffix(".json").write_text(json.dumps(about))
        yield expected


def ask(engine: str, artifact: Path, expected: Path, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Load the artifact in a fresh process of the engine and compare. Raises Mismatch where anything differs."""
    found = run_fresh(artifact, expected, DRIVERS[engine].script, engine)
    for name, what in (("relative_difference", "logits differ"), ("greedy_gap", "greedy text differs")):
        if not found[name] <= tolerance:  # so that NaN fails
            raise Mismatch(
                f"{artifact}: in {engine} {what} by {found[name]:.1e} of the largest logit, allowed {tolerance:.0e}"
            )
    return found


def ask_engines(
    engines: Sequence[str], found: dict[str, Standing], wanted: Sequence[str], artifact: Path, expected: Path
) -> dict[str, dict[str, Any]]:
    """Ask each of `engines` that may compute the model, put what it did into `found`, and return its figures.

    Raises Mismatch where one of `wanted` does not compute it; of another engine that is only said.
    """
    proofs = {}
    for engine in (engine for engine in engines if found[engine].verdict == UNPROVEN):
        if not is_installed(engine):
            found[engine] = Standing(UNPROVEN, f"{found[engine].why}; {not_installed(engine)}")
        elif engine in wanted or engine not in ON_REQUEST:
            try:
                proofs[engine] = ask(engine, artifact, expected)
            except Mismatch as error:
                if engine in wanted:
                    raise
                found[engine] = Standing(DIFFERENT, str(error).removeprefix(f"{artifact}: "))
            else:
                found[engine] = Standing(EXACT, proven(proofs[engine]))
    return proofs


def standing(proof: dict[str, Any], rounded_to: str | None = None) -> Standing:
    """Of a file for one engine. rounded_to: what the engine rounds to while it computes."""
    if not proof["proven"]:
        return Standing(UNPROVEN, proof["why"])
    if rounded_to is None:
        return Standing(EXACT, proven(proof))
    return Standing(ROUNDED, f"{proven(proof)}: it computes in {rounded_to}")


def proven(figures: dict[str, Any]) -> str:
    """How an engine was proven, in words."""
    return (
        f"loaded by it in a fresh process, logits within {figures['relative_difference']:.1e} of the largest "
        f"({figures['version']})"
    )


def prove(folder: Path, expected: Path, python: str = sys.executable) -> dict[str, Any]:
    """Load the folder with transformers in a fresh process and compare. Raises Mismatch when anything differs."""
    found = run_fresh(folder, expected, python=python)
    what = {
        "relative_difference": "logits differ",
        "loss_difference": "outputs[0] of a call with labels is not their loss: it differs",
        "second_difference": "a second copy in the process computes something else: logits differ",
        "greedy_gap": "greedy text differs where the two best logits are apart",
        "static_gap": "greedy text with a static cache differs where the two best logits are apart",
    }
    for name, fault in what.items():
        if not found[name] <= TOLERANCE:  # so that NaN fails
            raise Mismatch(f"{folder}: {fault} by {found[name]:.1e} of the largest, allowed {TOLERANCE:.0e}")
    return found


def run_fresh(
    artifact: Path, expected: Path, script: str = "fresh_load.py", *more: str, python: str = sys.executable
) -> dict[str, Any]:
    """A script of this room in a process of its own: offline, with an empty cache of remote code, where argonne cannot
    be imported. Raises Mismatch where it fails.
    """
    scratch = expected.parent
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_MODULES_CACHE": str(scratch / "modules"),
    }
    command = [python, str(Path(__file__).with_name(script)), str(artifact.resolve()), str(expected), *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("@@")]
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise Mismatch(f"{artifact}: does not load in a fresh process: {said}")
    result: dict[str, Any] = json.loads(lines[-1][2:])
    return result
