"""Run as a script in a fresh process: use a staged folder as its readers will, offline and without argonne.

Usage: python fresh_publish.py FOLDER EXPECTED.safetensors; EXPECTED.json beside it says what to find. Prints one JSON
line: what was found wrong. Imports nothing of argonne, and blocks it.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

PIECE = 8  # tokens that are read one by one behind the first half of a text


def look(folder: str, expected_path: str, about: dict[str, Any]) -> list[str]:
    """Of the auto classes, the cache, the end of an answer, the tokenizer and the chat template."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    problems: list[str] = []
    how: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
    config = AutoConfig.from_pretrained(folder, **how)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    expected = load_file(expected_path)
    with torch.no_grad():
        apart = cached_apart(model, expected["input_ids"], expected["logits"])
        if not apart <= about["tolerance"]:  # so that NaN fails
            problems.append(f"logits behind a cache differ by {apart:.1e} of the largest")
        problems += ends(model, about)
    tokenizer = AutoTokenizer.from_pretrained(folder, **how)
    problems += [f"tokenizer: {line}" for line in words(tokenizer, config, about)]
    return problems + [f"chat template: {line}" for line in asked(tokenizer, about["chat"] or [])]


def cached_apart(model: Any, ids: Any, logits: Any) -> float:
    """Difference of the logits, relative to the largest, where the second half is read behind a cache of the first:
    some tokens one by one, the rest at once.
    """
    length = ids.shape[1]
    first = max(1, length // 2)
    cuts = sorted({0, *(min(first + number, length) for number in range(PIECE + 1)), length})
    cache, worst = None, 0.0
    for start, end in itertools.pairwise(cuts):
        out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        apart = float((out.logits - logits[:, start:end]).abs().max() / logits.abs().max())
        worst = apart if not apart <= worst else worst
    return worst


def ends(model: Any, about: dict[str, Any]) -> list[str]:
    """Does an answer end at each id that ends one, by the folder's own settings?"""
    import torch

    def forced(wanted: int) -> Any:
        def process(ids: Any, scores: Any) -> Any:
            best = torch.full_like(scores, -1e9)
            best[:, wanted if ids.shape[1] == 3 else about["other"]] = 0.0
            return best

        return process

    found = []
    for wanted in about["eos"]:
        prompt = torch.full((1, 1), about["other"])
        done = model.generate(prompt, max_new_tokens=6, do_sample=False, logits_processor=[forced(wanted)])
        if done.shape[1] != 4:
            found.append(f"an answer goes on behind the id {wanted}, which ends one in training")
    return found


def words(tokenizer: Any, config: Any, about: dict[str, Any]) -> list[str]:
    found = []
    for text, ids in zip(about["texts"], about["ids"], strict=True):
        its = tokenizer(text, add_special_tokens=False)["input_ids"]
        if its != ids:
            found.append(f"{text[:40]!r} becomes {its[:8]}, in training {ids[:8]}")
            break
    if tokenizer.pad_token_id is None:
        found.append("it has no pad token: batches cannot be made")
    if tokenizer.model_max_length != about["context"]:
        found.append(f"model_max_length is {tokenizer.model_max_length:,}, the context {about['context']:,}")
    if (highest := max(tokenizer.get_vocab().values())) >= config.vocab_size:
        found.append(f"it has ids up to {highest:,}, the embedding {config.vocab_size:,} rows")
    return found


def asked(tokenizer: Any, chat: list[Any]) -> list[str]:
    found = []
    for messages, ids in chat:
        how = {"add_generation_prompt": True, "return_dict": True}
        its = tokenizer.apply_chat_template(messages, **how)["input_ids"]
        if its != ids:
            texts = [tokenizer.decode(part)[:80] for part in (its, ids)]
            found.append(f"a conversation becomes {texts[0]!r}, in training {texts[1]!r}")
    return found


if __name__ == "__main__":
    sys.modules["argonne"] = None  # type: ignore[assignment]
    given = json.loads(Path(sys.argv[2]).with_suffix(".json").read_text())
    print("@@" + json.dumps({"problems": look(sys.argv[1], sys.argv[2], given)}))
