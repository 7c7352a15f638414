"""The text that the data benchmarks read: documents of about 3,000 characters in one parquet file, made once and kept
in the temporary folder.

The books of ../shared where they are, else the documentation that this Python carries. `copies` above 1 repeats the
documents with their paragraphs in another order, so that the fast encoders run for seconds.
"""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
DOCUMENT_CHARACTERS = 3000


def tokenizer_folder() -> Path:
    """The Qwen3 tokenizer of ../shared, else one trained here on the same text."""
    if (SHARED / "tokenizers/qwen3").is_dir():
        return SHARED / "tokenizers/qwen3"
    folder = Path(tempfile.gettempdir()) / "argonne-benchmark-tokenizer"
    if not folder.exists():
        from argonne.tokens.tokenizer import train_tokenizer

        train_tokenizer(documents(), 16384, folder)
    return folder


def documents() -> list[str]:
    """The documents in memory."""
    import pyarrow.parquet as parquet

    books = SHARED / "data/pretrain/books.parquet"
    if books.exists():
        texts = parquet.read_table(books, columns=["text"])["text"].to_pylist()
    else:
        import json

        from argonne.stages.corpus import write_corpus

        path = Path(tempfile.gettempdir()) / "argonne-benchmark-corpus.jsonl"
        if not path.exists():
            write_corpus(path)
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return [
        text[start : start + DOCUMENT_CHARACTERS]
        for text in texts
        for start in range(0, len(text), DOCUMENT_CHARACTERS)
    ]


def parquet_file(share: float = 1.0, copies: int = 1) -> Path:
    """A parquet file with the first `share` of the documents, `copies` times."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = Path(tempfile.gettempdir()) / f"argonne-benchmark-text-{share:g}-{copies}" / "text.parquet"
    if not path.exists():
        found = documents()
        found = found[: int(share * len(found))]
        base, generator = list(found), random.Random(0)
        for _ in range(copies - 1):
            found += [_shuffled(text, generator) for text in base]
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pa.table({"text": found}), path, row_group_size=1000)
    return path


def _shuffled(text: str, generator: random.Random) -> str:
    sentences = text.split(". ")
    generator.shuffle(sentences)
    return ". ".join(sentences)


def megabytes(path: Path) -> float:
    """UTF-8 size of the text, read in small batches: what measures memory must not use it."""
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        batches = file.iter_batches(256, columns=["text"], use_threads=False)
        return sum(compute.sum(compute.binary_length(batch.column(0))).as_py() or 0 for batch in batches) / 1e6


def use_own_cache() -> None:
    """litdata empties /tmp/data and /tmp/chunks unless it is told to work elsewhere."""
    for name in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
        os.environ[name] = str(Path(tempfile.gettempdir()) / f"argonne-benchmark-{name.lower()}")
