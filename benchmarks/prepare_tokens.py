"""Parquet -> token file, end to end and on all cores: `argonne prepare` beside datatrove, litdata and the bare encoder
in memory.

datatrove and litdata are measured where they are installed (`pip install datatrove litdata`); they are no dependency of
ours.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Benchmark, Column, main
from benchmarks.memory import TreeMemory
from benchmarks.texts import megabytes, parquet_file, tokenizer_folder, use_own_cache

# The fast encoder reads four times as much: its second of start-up would hide it.
SIZE, FAST_SIZE = (1.0, 4), (1.0, 16)


def measure(work: Callable[[Path, Path], Any], size: tuple[float, int]) -> dict[str, float]:
    """MB/s of text from the parquet file to whatever `work(file, folder)` writes."""
    path = parquet_file(*size)
    return measured(work, path, megabytes(path))


def measured(work: Callable[[Path, Path], Any], path: Path, text: float) -> dict[str, float]:
    """MB/s of `text` megabytes and the peak of memory, start-up of its processes included."""
    with tempfile.TemporaryDirectory() as folder, TreeMemory() as memory:
        start = time.perf_counter()
        work(path, Path(folder))
        seconds = time.perf_counter() - start
    return {"rate": text / seconds, "peak": memory.peak_mb}


def raw(_point: str) -> dict[str, float]:
    """The reference encoder alone: text in memory, ids kept as numpy; its tokenizer is loaded before
    the clock starts.
    """
    import pyarrow.parquet as parquet
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder() / "tokenizer.json"))

    def work(path: Path, _: Path) -> None:
        texts = parquet.read_table(path)["text"].to_pylist()
        _ids = [
            np.array(found.ids, dtype=np.uint32)
            for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    return measure(work, SIZE)


def ours(encoder: str, size: tuple[float, int]) -> dict[str, float]:
    from argonne.prepare.options import PrepareOptions
    from argonne.prepare.prepare import prepare
    from argonne.prepare.progress import ProgressBar

    def work(path: Path, folder: Path) -> None:
        prepare(
            PrepareOptions((str(path),), folder / "tokens", tokenizer_folder(), encoder=encoder),
            ProgressBar("prepare", 0, None),
        )

    return measure(work, size)


def datatrove(_point: str) -> dict[str, float]:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    def work(path: Path, folder: Path) -> None:
        steps = [
            ParquetReader(str(path.parent)),
            DocumentTokenizer(
                str(folder / "out"),
                tokenizer_name_or_path=str(tokenizer_folder() / "tokenizer.json"),
                shuffle_documents=False,
            ),
        ]
        LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=str(folder / "logs")).run()

    return measure(work, SIZE)


def _litdata_ids(rows: tuple[str, int, int]) -> Any:
    import pyarrow.parquet as parquet
    import torch
    from tokenizers import Tokenizer

    path, start, stop = rows
    tokenizer = Tokenizer.from_file(str(tokenizer_folder() / "tokenizer.json"))
    for text in parquet.read_table(path)["text"].to_pylist()[start:stop]:
        yield torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int32)


def litdata(_point: str) -> dict[str, float]:
    import pyarrow.parquet as parquet

    use_own_cache()
    from litdata import TokensLoader, optimize

    from benchmarks import prepare_tokens

    def work(path: Path, folder: Path) -> None:
        rows, cores = parquet.ParquetFile(path).metadata.num_rows, os.cpu_count() or 1
        edges = [rows * number // cores for number in range(cores + 1)]
        inputs = [(str(path), edges[number], edges[number + 1]) for number in range(cores)]
        optimize(
            prepare_tokens._litdata_ids,
            inputs,
            str(folder / "out"),
            num_workers=cores,
            chunk_bytes="64MB",
            item_loader=TokensLoader(),
        )

    return measure(work, SIZE)


CONTESTANTS: dict[str, Callable[[str], dict[str, float]]] = {
    "tokenizers encode_batch_fast, in memory": raw,
    "argonne prepare, reference encoder": lambda _: ours("tokenizers", SIZE),
    "argonne prepare, fast encoder": lambda _: ours("gigatoken", FAST_SIZE),
    **({"datatrove": datatrove} if importlib.util.find_spec("datatrove") else {}),
    **({"litdata optimize": litdata} if importlib.util.find_spec("litdata") else {}),
}

BENCHMARK = Benchmark(
    name="prepare_tokens",
    module="benchmarks.prepare_tokens",
    contestants=CONTESTANTS,
    points={
        "books": (
            "MB/s of text from parquet to token shards, all cores, start-up included (peak: all its processes together)"
        )
    },
    columns=(Column("rate", "MB/s", ",.1f"), Column("peak", "peak MB")),
    relative_to="tokenizers encode_batch_fast, in memory",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
