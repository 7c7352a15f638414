"""Run as a script in a fresh process: load a GGUF file with llama.cpp and compare it with what the model gave.

Usage: python fresh_llama_cpp.py FILE EXPECTED.safetensors ENGINE, with EXPECTED.json beside it (threads, texts and
control tokens with their ids, the end of text); prints one JSON line. Imports nothing of argonne.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

F32 = 0  # llama.cpp's number of the type


def compare(file: str, expected_path: str) -> dict[str, Any]:
    """Differences of logits, relative to the largest, of ids read at once; at each greedy token, read one by one, how
    far it lies below the best; texts that get other ids. A value that is not finite makes its difference so.
    """
    import llama_cpp
    import numpy as np
    from safetensors.numpy import load_file

    expected, about = load_file(expected_path), json.loads(Path(expected_path).with_suffix(".json").read_text())
    ids, greedy, prompt = expected["input_ids"][0], expected["greedy_ids"][0], int(expected["prompt_length"])
    length = max(len(ids), len(greedy))
    threads = {"n_threads": about["threads"], "n_threads_batch": about["threads"]}
    # Keys and values in fp32: by default llama.cpp keeps them in half of the bits.
    model = llama_cpp.Llama(
        file, n_ctx=length, n_batch=length, logits_all=True, type_k=F32, type_v=F32, verbose=False, **threads
    )
    model.eval(ids.tolist())
    logits, wanted = model.scores[: len(ids)], expected["logits"][0]
    difference = float(np.abs(logits - wanted).max() / np.abs(wanted).max())
    model.reset()
    model.eval(greedy[:prompt].tolist())
    gaps = []
    for token in greedy[prompt:].tolist():
        row = model.scores[model.n_tokens - 1]
        gaps.append(float((row.max() - row[token]) / np.abs(row).max()))
        model.eval([token])
    other = [text for text, ids in about["texts"].items() if model.tokenize(text.encode(), False, False) != ids]
    controls = about["controls"].items()
    other += [name for name, number in controls if model.tokenize(name.encode(), False, True) != [number]]
    if about["eos"] not in (None, model.token_eos()):
        other.append("the end of text")
    return {
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        "relative_difference": difference,
        "greedy_tokens": len(gaps),
        "greedy_equal": sum(gap == 0 for gap in gaps),
        "greedy_gap": max(gaps) if all(gap == gap for gap in gaps) else float("nan"),
        "texts": len(about["texts"]),
        "other_ids": other,
    }


if __name__ == "__main__":
    print("@@" + json.dumps(compare(sys.argv[1], sys.argv[2])))
