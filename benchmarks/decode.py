"""Tokens a second of greedy answers, several at once: the engine, in fp32 and int8, beside transformers' `generate` on
the same weights, with a growing and with a fixed cache, and llama.cpp, which has models of 2.x's kind alone.

Prompts of PROMPT random ids, NEW new tokens each, no stop token. `generate` gets all rows as one batch of equal length,
which spares it padding, and so does llama.cpp; the engine reads prompts as requests come. Reading prompts counts.
Nothing is guessed: what random weights write repeats itself, and guesses would come true.

The memory's limit: each token of an answer reads every weight, all answers together once. How fast this machine reads
is measured by each contestant behind its answers, so that a slow spell falls on both.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from functools import partial
from typing import Any

from benchmarks.harness import Benchmark, Column, main, median_seconds, peak_memory_mb, reset_peak_memory

PROMPT, NEW = 64, 64
# hidden size, layers, heads, key-value heads, MLP, vocabulary
SIZES = {
    "1M": (128, 4, 4, 1, 384, 2048),
    "8M": (320, 6, 5, 1, 896, 2048),
    "85M": (768, 12, 12, 4, 2304, 12_000),
    "85M-2.x": (768, 12, 12, 4, 2304, 12_000),
}
SECOND = "-2.x"  # ends the names of sizes of 2.x's kind, the others are of 3.0's
LLAMA_CPP = ("llama.cpp f32", "llama.cpp Q8_0")
MISSING = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
FP32, INT8 = 4, 1  # bytes of a weight; Q8_0 has two more for each 32
ANSWERS = (1, 8, 64)


def build(size: str) -> Any:
    """A model of 3.0's or 2.x's kind with fresh weights, fp32."""
    from argonne.model.build import build_model, config_from_fields
    from argonne.presets import preset

    hidden, layers, heads, kv_heads, mlp, vocabulary = SIZES[size]
    own = preset("nano-2.5" if size.endswith(SECOND) else "nano-3.0").fields
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


def llama_cpp(engine: Any, rows: list[list[int]], new: int) -> int:
    from benchmarks.llama_cpp_engine import generate

    return sum(len(ids) for ids in generate(engine, rows, new))


def measure(run: Any, point: str, weight: int = FP32) -> dict[str, float]:
    """weight: bytes of one. Its share of the limit is of what as many bytes allow."""
    size, _, answers = point.rpartition("-")
    model, rows = build(size), prompts(int(answers))
    weights = read_weights(model)
    if run is engine:
        from argonne.serve.quantize import pack, quantize

        if weight == INT8:
            quantize(model)
        pack(model)
    if run is llama_cpp:
        from argonne.tokens.parsed import give_memory_back
        from benchmarks.llama_cpp_engine import Engine

        model = Engine(model, "q8_0" if weight == INT8 else "f32", len(rows), PROMPT + NEW)
        give_memory_back()  # of the model that the file was written from
    run(model, rows, 2)
    reset_peak_memory()
    start = time.perf_counter()
    tokens = run(model, rows, NEW)
    rate, peak = tokens / (time.perf_counter() - start), peak_memory_mb()
    return {"rate": rate, "peak": peak, "share": 100 * rate / (len(rows) * bytes_a_second() / (weights * weight))}


def limit(point: str, weight: int) -> dict[str, float]:
    """Tokens a second of all answers where reading the weights is all that takes time."""
    size, _, answers = point.rpartition("-")
    return {"rate": int(answers) * bytes_a_second() / (read_weights(build(size)) * weight)}


def read_weights(model: Any) -> int:
    """Weights that a token reads: all but the rows of an embedding that is not the head too."""
    table = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    return sum(parameter.numel() for parameter in model.parameters()) - table


def bytes_a_second() -> float:
    """How fast torch's threads read memory: a sum over more than any cache holds."""
    import torch

    large = torch.ones(1 << 27)
    return large.numel() * large.element_size() / median_seconds(large.sum, 5)


def takes_part(contestant: str, point: str) -> bool:
    return contestant not in LLAMA_CPP or point.rpartition("-")[0].endswith(SECOND)


def benchmark(sizes: list[str], answers: list[int]) -> Benchmark:
    fixed = partial(transformers, cache_implementation="static", disable_compile=True)
    others = {
        name: partial(measure, llama_cpp, weight=weight) for name, weight in zip(LLAMA_CPP, (FP32, INT8), strict=True)
    }
    return Benchmark(
        name="decode",
        module="benchmarks.decode",
        contestants={
            "argonne": lambda point: measure(engine, point),
            "argonne, int8": lambda point: measure(engine, point, INT8),
            "transformers generate": lambda point: measure(transformers, point),
            "transformers generate, static cache": lambda point: measure(fixed, point),
            **({} if MISSING else others),
            "the memory's limit, fp32": lambda point: limit(point, FP32),
            "the memory's limit, int8": lambda point: limit(point, INT8),
        },
        points={
            f"{size}-{count}": f"{count} answer{'s' * (count > 1)} of {NEW} tokens to prompts of {PROMPT}, "
            f"{size.replace(SECOND, ' (2.x)')} parameters, vocabulary {SIZES[size][-1]:,}, fp32 but for int8 and Q8_0"
            for size in sizes
            for count in answers
        },
        columns=(
            Column("rate", "tokens/s"),
            Column("peak", "peak memory, MB"),
            Column("share", "% of the memory's limit"),
        ),
        relative_to="transformers generate",
        flags=f" --sizes {' '.join(sizes)} --answers {' '.join(map(str, answers))}",
        takes_part=takes_part,
    )


BENCHMARK = benchmark(["1M"], [1, 8])

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["1M"])
    parser.add_argument("--answers", nargs="+", type=int, choices=ANSWERS, default=[1, 8])
    options, rest = parser.parse_known_args()
    if "--child" in rest:  # a child is told its point only
        options.sizes, options.answers = list(SIZES), list(ANSWERS)
    elif MISSING:
        print(
            f"llama.cpp: left out, {MISSING[0]} is not installed (pip install llama-cpp-python gguf)", file=sys.stderr
        )
    sys.exit(main(benchmark(options.sizes, options.answers), rest))
