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
    """Differences relative to the largest value: of logits, of the loss that comes first, of a second copy's logits;
    greedy text, with the default cache and a static one; and what AutoModel returns. A value that is not finite makes
    its difference so.
    """
    import torch
    import transformers
    from safetensors.torch import load_file
    from torch.nn import functional as F
    from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

    expected = load_file(expected_path)
    settings: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    model.generation_config = GenerationConfig()  # so that the greedy text may hold any id, as the model's does

    def difference(found: Any, wanted: Any) -> float:
        return float((found - wanted).abs().max() / wanted.abs().max())

    ids, greedy = expected["input_ids"], expected["greedy_ids"]
    prompt = int(expected["prompt_length"])
    new = greedy.shape[1] - prompt
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        first = model(input_ids=ids, labels=ids)[0]
        loss = F.cross_entropy(expected["logits"][0, :-1], ids[0, 1:])
        found = model.generate(greedy[:, :prompt], **how)
        static = model.generate(greedy[:, :prompt], cache_implementation="static", **how)
        hidden = AutoModel.from_pretrained(folder, **settings).eval()(input_ids=greedy[:, :prompt]).last_hidden_state
        second = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()(input_ids=ids).logits
        return {
            "class": type(model).__name__,
            "version": f"transformers {transformers.__version__}",
            "relative_difference": difference(logits, expected["logits"]),
            "loss_difference": difference(first, loss),
            "second_difference": difference(second, expected["logits"]),
            "greedy_equal": bool(torch.equal(found, greedy)),
            "greedy_gap": gap_at_difference(model, found, greedy),
            "static_gap": gap_at_difference(model, static, greedy),
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
