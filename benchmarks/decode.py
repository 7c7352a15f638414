"""Tokens a second of greedy answers, several at once: the engine, in fp32 and int8, beside transformers' `generate` on
the same weights, with a growing and with a fixed cache.

Prompts of PROMPT random ids, NEW new tokens each, no stop token. `generate` gets all rows as one batch of equal length,
which spares it padding; the engine reads prompts as requests come. Reading prompts counts. Nothing is guessed: what
random weights write repeats itself, and guesses would come true.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import Any

from benchmarks.harness import Benchmark, Column, main, peak_memory_mb, reset_peak_memory

PROMPT, NEW = 64, 64
# hidden size, layers, heads, key-value heads, MLP, vocabulary
SIZES = {
    "1M": (128, 4, 4, 1, 384, 2048),
    "8M": (320, 6, 5, 1, 896, 2048),
    "85M": (768, 12, 12, 4, 2304, 12_000),
}
ANSWERS = (1, 8, 64)


def build(size: str) -> Any:
    """A model of 3.0's kind with fresh weights, fp32."""
    from argonne.model.build import build_model, config_from_fields
    from argonne.presets import preset

    hidden, layers, heads, kv_heads, mlp, vocabulary = SIZES[size]
    own = preset("nano-3.0").fields
    fields = {
        **own,
        "layer_types": [own["layer_types"][layer % len(own["layer_types"])] for layer in range(layers)],
        "vocab_size": vocabulary,
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
    return torch.randint(0, 2000, (answers, PROMPT), generator=draw).tolist()


def engine(model: Any, rows: list[list[int]], new: int) -> int:
    """The number of tokens that the engine generated."""
    from argonne.serve.decoder import Decoder
    from argonne.serve.options import SamplingOptions

    decoder = Decoder(model, rows=len(rows), context=PROMPT + new, deterministic=True, patience=len(rows))
    answers = [decoder.submit(row, SamplingOptions(new, temperature=0.0), []) for row in rows]
    while decoder.busy:
        decoder.step()
    return sum(len(answer.ids) for answer in answers)


def transformers(model: Any, rows: list[list[int]], new: int, **more: Any) -> int:
    import torch

    ids = torch.tensor(rows)
    told: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "eos_token_id": None}
    how = {**told, "pad_token_id": 0, **more}
    return int(model.generate(ids, attention_mask=torch.ones_like(ids), **how).numel() - ids.numel())


def measure(run: Any, point: str, int8: bool = False) -> dict[str, float]:
    size, answers = point.split("-")
    model, rows = build(size), prompts(int(answers))
    if int8:
        from argonne.serve.quantize import quantize

        quantize(model)
    elif run is engine:
        from argonne.serve.forward import pack

        pack(model)
    run(model, rows, 2)
    reset_peak_memory()
    start = time.perf_counter()
    tokens = run(model, rows, NEW)
    return {"rate": tokens / (time.perf_counter() - start), "peak": peak_memory_mb()}


def benchmark(sizes: list[str], answers: list[int]) -> Benchmark:
    fixed = partial(transformers, cache_implementation="static", disable_compile=True)
    return Benchmark(
        name="decode",
        module="benchmarks.decode",
        contestants={
            "argonne": lambda point: measure(engine, point),
            "argonne, int8": lambda point: measure(engine, point, int8=True),
            "transformers generate": lambda point: measure(transformers, point),
            "transformers generate, static cache": lambda point: measure(fixed, point),
        },
        points={
            f"{size}-{count}": f"{count} answer{'s' * (count > 1)} of {NEW} tokens to prompts of {PROMPT}, "
            f"{size} parameters, vocabulary {SIZES[size][-1]:,}, fp32 but for int8"
            for size in sizes
            for count in answers
        },
        columns=(Column("rate", "tokens/s"), Column("peak", "peak memory, MB")),
        relative_to="transformers generate",
        flags=f" --sizes {' '.join(sizes)} --answers {' '.join(map(str, answers))}",
    )


BENCHMARK = benchmark(["1M"], [1, 8])

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["1M"])
    parser.add_argument("--answers", nargs="+", type=int, choices=ANSWERS, default=[1, 8])
    options, rest = parser.parse_known_args()
    if "--child" in rest:  # a child is told its point only
        options.sizes, options.answers = list(SIZES), list(ANSWERS)
    sys.exit(main(benchmark(options.sizes, options.answers), rest))
