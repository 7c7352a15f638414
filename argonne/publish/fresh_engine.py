"""Run as a script in a fresh process: load an artifact with an engine and compare it with what the model gave.

Usage: python fresh_engine.py ARTIFACT EXPECTED.safetensors ENGINE; prints one JSON line. Imports nothing of argonne.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Loaded(NamedTuple):
    """An artifact in its engine. read: ids (T) -> logits (T, V), all at once. follow: prompt and tokens -> the logits
    (V) in front of each token, as the engine itself writes text. log_probabilities: what it gives are those.
    """

    version: str
    read: Callable[[list[int]], np.ndarray]
    follow: Callable[[list[int], list[int]], Iterator[np.ndarray]]
    log_probabilities: bool = False


def mlx(folder: str) -> Loaded:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder), strict=True)
    model.set_dtype(mx.float32)

    def read(ids: list[int], cache: Any = None) -> np.ndarray:
        return np.array(model(mx.array([ids]), cache=cache)[0])

    def follow(prompt: list[int], tokens: list[int]) -> Iterator[np.ndarray]:
        cache = make_prompt_cache(model)
        row = read(prompt, cache)[-1]
        for token in tokens:
            yield row
            row = read([token], cache)[-1]

    return Loaded(f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}", read, follow)


def onnx(file: str) -> Loaded:
    """The graph has no cache: each token is written by reading the whole text again."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def read(ids: list[int]) -> np.ndarray:
        rows: np.ndarray = session.run(["logits"], {"input_ids": np.array([ids], dtype=np.int64)})[0][0]
        return rows

    return Loaded(f"onnxruntime {onnxruntime.__version__}", read, again(read))


def vllm(folder: str) -> Loaded:
    """Its own class where it has one, else its Transformers backend: `model_impl="auto"` is its default."""
    import vllm

    engine = vllm.LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        trust_remote_code=True,
        skip_tokenizer_init=True,
        max_logprobs=-1,
    )
    how = vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, prompt_logprobs=-1, detokenize=False)

    def read(ids: list[int]) -> np.ndarray:
        """Of the first token it says nothing; of what would come after the last it does."""
        answer = engine.generate([{"prompt_token_ids": ids}], how, use_tqdm=False)[0]
        rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
        return np.array([[row[token].logprob for token in range(len(row))] for row in rows])

    return Loaded(f"vllm {vllm.__version__}", read, again(read), log_probabilities=True)


def again(read: Callable[[list[int]], np.ndarray]) -> Callable[[list[int], list[int]], Iterator[np.ndarray]]:
    """Text as an engine without a cache of its own writes it: everything is read again for each token."""

    def follow(prompt: list[int], tokens: list[int]) -> Iterator[np.ndarray]:
        for count in range(len(tokens)):
            yield read([*prompt, *tokens[:count]])[-1]

    return follow


def compare(loaded: Loaded, expected_path: str) -> dict[str, Any]:
    """Difference of the logits, relative to the largest; at each greedy token, how far it lies below the best. A value
    that is not finite makes its difference so.
    """
    from safetensors.numpy import load_file

    expected = load_file(expected_path)
    ids, greedy, prompt = expected["input_ids"][0], expected["greedy_ids"][0].tolist(), int(expected["prompt_length"])
    wanted = expected["logits"][0].astype(np.float64)
    largest = float(np.abs(wanted).max())
    if loaded.log_probabilities:
        peak = wanted.max(-1, keepdims=True)
        wanted = wanted - peak - np.log(np.exp(wanted - peak).sum(-1, keepdims=True))
    found = loaded.read(ids.tolist())
    tokens = greedy[prompt:]
    rows = loaded.follow(greedy[:prompt], tokens)
    gaps = [float((row.max() - row[token]) / largest) for token, row in zip(tokens, rows, strict=True)]
    return {
        "version": loaded.version,
        "relative_difference": float(np.abs(found - wanted).max() / largest),
        "greedy_tokens": len(gaps),
        "greedy_equal": sum(gap == 0 for gap in gaps),
        "greedy_gap": max(gaps) if all(gap == gap for gap in gaps) else float("nan"),
    }


if __name__ == "__main__":
    sys.modules["argonne"] = None  # type: ignore[assignment]
    engines = {"mlx": mlx, "onnx": onnx, "vllm": vllm}
    print("@@" + json.dumps(compare(engines[sys.argv[3]](sys.argv[1]), sys.argv[2])))
