"""Tokens a second of greedy answers, several at once: the engine beside transformers' `generate` on the same weights.

Prompts of PROMPT random ids, NEW new tokens each, no stop token. `generate` gets all rows as one batch of equal length,
which spares it padding; the engine reads prompts one by one in chunks, as requests come. Reading prompts counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from benchmarks.harness import Benchmark, Column, main, peak_memory_mb, reset_peak_memory

PROMPT, NEW, VOCABULARY = 64, 64, 2048
# hidden size, layers, heads, key-value heads, MLP
SIZES = {"8M": (320, 6, 5, 1, 896), "30M": (512, 10, 8, 2, 1408), "85M": (768, 12, 12, 4, 2304)}
ANSWERS = (1, 8, 64)


def build(size: str) -> Any:
    """A model of 3.0's kind with fresh weights, fp32."""
    from argonne.model.build import build_model, config_from_fields
    from argonne.presets import preset

    hidden, layers, heads, kv_heads, mlp = SIZES[size]
    own = preset("nano-3.0").fields
    fields = {
        **own,
        "layer_types": [own["layer_types"][layer % len(own["layer_types"])] for layer in range(layers)],
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "head_dim": hidden // heads,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "max_position_embeddings": PROMPT + NEW,
    }
    return build_model(config_from_fields(fields), seed=0).eval()


def prompts(answers: int) -> list[list[int]]:
    import torch

    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (answers, PROMPT), generator=draw).tolist()


def engine(model: Any, rows: list[list[int]], new: int) -> int:
    """The number of tokens that the engine generated."""
    from argonne.serve.engine import decoder_for
    from argonne.serve.options import SamplingOptions

    decoder = decoder_for(model, rows, [new] * len(rows), rows=max(ANSWERS))
    answers = [decoder.submit(row, SamplingOptions(new, temperature=0.0), []) for row in rows]
    while decoder.busy:
        decoder.step()
    return sum(len(answer.ids) for answer in answers)


def transformers(model: Any, rows: list[list[int]], new: int) -> int:
    import torch

    ids = torch.tensor(rows)
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return int(model.generate(ids, attention_mask=torch.ones_like(ids), **how).numel() - ids.numel())


def measure(run: Any, point: str) -> dict[str, float]:
    size, answers = point.split("-")
    model, rows = build(size), prompts(int(answers))
    run(model, rows, 2)
    reset_peak_memory()
    start = time.perf_counter()
    tokens = run(model, rows, NEW)
    return {"rate": tokens / (time.perf_counter() - start), "peak": peak_memory_mb()}


def benchmark(sizes: list[str]) -> Benchmark:
    return Benchmark(
        name="decode",
        module="benchmarks.decode",
        contestants={
            "argonne": lambda point: measure(engine, point),
            "transformers generate": lambda point: measure(transformers, point),
        },
        points={
            f"{size}-{answers}": f"{answers} answer{'s' * (answers > 1)} of {NEW} tokens to prompts of {PROMPT}, "
            f"{size} parameters, vocabulary {VOCABULARY:,}, fp32"
            for size in sizes
            for answers in ANSWERS
        },
        columns=(Column("rate", "tokens/s"), Column("peak", "peak memory, MB")),
        relative_to="transformers generate",
        flags=" --sizes " + " ".join(sizes),
    )


BENCHMARK = benchmark(["8M"])

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["8M"])
    options, rest = parser.parse_known_args()
    if "--child" in rest:  # a child is told its point only
        options.sizes = list(SIZES)
    sys.exit(main(benchmark(options.sizes), rest))
