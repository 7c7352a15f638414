"""Run as a script in a fresh process: load a staged folder with stock transformers, offline and without argonne, and
compare.

Usage: python fresh_load.py FOLDER EXPECTED.safetensors; prints one JSON line. Imports nothing of argonne, and blocks
it.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def compare(folder: str, expected_path: str) -> dict[str, Any]:
    """Largest logit difference relative to the largest logit, greedy text, and what AutoModel returns."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForCausalLM

    expected = load_file(expected_path)
    settings: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits
    ids = expected["greedy_ids"]
    prompt = int(expected["prompt_length"])
    greedy = model.generate(
        ids[:, :prompt],
        max_new_tokens=ids.shape[1] - prompt,
        min_new_tokens=ids.shape[1] - prompt,
        do_sample=False,
        pad_token_id=0,
    )
    hidden = AutoModel.from_pretrained(folder, **settings).eval()(input_ids=ids[:, :prompt]).last_hidden_state
    return {
        "class": type(model).__name__,
        "relative_difference": float((logits - expected["logits"]).abs().max() / expected["logits"].abs().max()),
        "greedy_equal": bool(torch.equal(greedy, ids)),
        "greedy_gap": gap_at_difference(model, greedy, ids),
        "hidden_shape": list(hidden.shape),
    }


def gap_at_difference(model: Any, found: Any, wanted: Any) -> float:
    """Distance of the two best logits, relative to the largest, where two greedy texts part; 0 where they do not."""
    different = (found != wanted).nonzero()
    if not len(different):
        return 0.0
    last = model(input_ids=wanted[:, : int(different[0, 1])]).logits[0, -1]
    best = last.topk(2).values
    return float((best[0] - best[1]) / last.abs().max())


if __name__ == "__main__":
    sys.modules["argonne"] = None  # type: ignore[assignment]
    print("@@" + json.dumps(compare(sys.argv[1], sys.argv[2])))
