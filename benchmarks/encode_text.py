"""Text -> ids in memory, on all cores: the encoders themselves. The ids of all contestants are compared."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Benchmark, Column, main, peak_memory_mb, reset_peak_memory
from benchmarks.texts import megabytes, parquet_file, tokenizer_folder

SLOW, FAST = (0.3, 1), (1.0, 4)


def measure(encode: Callable[[Sequence[str]], Any], size: tuple[float, int]) -> dict[str, float]:
    """MB/s of one pass after a short warm-up on other text, and the peak memory. `encode` returns arrays of ids, or
    (one flat array, lengths).
    """
    import pyarrow.parquet as parquet

    path = parquet_file(*size)
    texts = parquet.read_table(path)["text"].to_pylist()
    check_ids(encode(texts[-20:]), texts[-20:])
    reset_peak_memory()
    start = time.perf_counter()
    encode(texts)
    return {"rate": megabytes(path) / (time.perf_counter() - start), "peak": peak_memory_mb()}


def check_ids(found: Any, texts: Sequence[str]) -> None:
    """Raise ValueError where a contestant's ids are not those of `tokenizers`. `found`: arrays of ids, or one flat
    array.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder() / "tokenizer.json"))
    expected = [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False).ids]
    flat = found[0] if isinstance(found, tuple) else np.concatenate([np.atleast_1d(part) for part in found])
    if flat.tolist() != expected:
        raise ValueError("these ids are not those of tokenizers")


def tokenizers_batch(method: str) -> dict[str, float]:
    from tokenizers import Tokenizer

    encode = getattr(Tokenizer.from_file(str(tokenizer_folder() / "tokenizer.json")), method)
    return measure(
        lambda texts: [np.array(found.ids, dtype=np.uint32) for found in encode(texts, add_special_tokens=False)], SLOW
    )


def gigatoken(_point: str) -> dict[str, float]:
    import awkward
    import gigatoken

    tokenizer = gigatoken.Tokenizer(str(tokenizer_folder() / "tokenizer.json"))
    return measure(lambda texts: np.asarray(awkward.flatten(tokenizer.encode_batch(list(texts), parallel=True))), FAST)


def ours(name: str, size: tuple[float, int]) -> dict[str, float]:
    from argonne.prepare.encoders import load
    from argonne.tokens.tokenizer import load_tokenizer

    return measure(load(name, load_tokenizer(tokenizer_folder())).encode, size)


BENCHMARK = Benchmark(
    name="encode_text",
    module="benchmarks.encode_text",
    contestants={
        "tokenizers encode_batch": lambda _: tokenizers_batch("encode_batch"),
        "tokenizers encode_batch_fast": lambda _: tokenizers_batch("encode_batch_fast"),
        "gigatoken": gigatoken,
        "argonne, reference encoder": lambda _: ours("tokenizers", SLOW),
        "argonne, fast encoder": lambda _: ours("gigatoken", FAST),
    },
    points={"books": "MB/s of text to ids in memory, all cores (books; documents of 3,000 characters)"},
    columns=(Column("rate", "MB/s", ",.1f"), Column("peak", "peak MB")),
    relative_to="tokenizers encode_batch_fast",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
