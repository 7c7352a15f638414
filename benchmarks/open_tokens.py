"""Seconds and memory until a run can read its first batch from shard sets of different sizes. The shards are sparse:
they need no disk.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark, Column, main, peak_memory_mb, reset_peak_memory
from benchmarks.texts import tokenizer_folder

SHARD_TOKENS, DOCUMENT_TOKENS = 32 * 2**20, 1024
SETS = {"1 GB": 8, "10 GB": 80, "304 GB (76 billion tokens)": 2265}


def shard_set(shards: int) -> Path:
    """A token set of `shards` sparse shards of 134 MB, made once."""
    from argonne.tokens import manifest as manifests
    from argonne.tokens import shards as tokens
    from argonne.tokens.tokenizer import load_tokenizer

    folder = Path(tempfile.gettempdir()) / f"argonne-benchmark-open-{shards}"
    if (folder / tokens.MANIFEST).exists():
        return folder
    tokenizer = load_tokenizer(tokenizer_folder())
    tokenizer.save(folder / "tokenizer")
    documents = SHARD_TOKENS // DOCUMENT_TOKENS
    entries = []
    for number in range(shards):
        path = folder / f"tokens-{number:05d}.bin"
        _sparse(path, tokens.header("uint32", SHARD_TOKENS), 1024 + 4 * SHARD_TOKENS)
        _sparse(path.with_suffix(".idx"), b"", 8 * documents)
        entry: dict[str, Any] = {"file": path.name, "tokens": SHARD_TOKENS, "documents": documents, "text_bytes": 0}
        entries.append(
            {**entry, "bytes": path.stat().st_size, "sha256": f"{number:064x}", "index_sha256": f"{number:064x}"}
        )
    manifest = {
        "format": manifests.FORMAT,
        "format_version": manifests.FORMAT_VERSION,
        "dtype": "uint32",
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "bos_id": None,
        },
        "rows": shards * documents,
        "documents": shards * documents,
        "tokens": shards * SHARD_TOKENS,
        "held_out": {"share": 0.0, "tokens": 0, "documents": 0, "text_bytes": 0, "shards": []},
        "shards": entries,
        "sources": [],
    }
    manifests.write_manifest(folder, manifest)
    return folder


def _sparse(path: Path, head: bytes, size: int) -> None:
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


def measure(shards: int) -> dict[str, float]:
    """Open the set as a run does (imports and tokenizer apart), then read a shuffled batch of 8 rows
    of 1,024 tokens.
    """
    from argonne.config import BatchSection, DataSection, SourceSection
    from argonne.data.dataset import open_training_data
    from argonne.data.loader import Loader
    from argonne.tokens.tokenizer import load_tokenizer

    folder = shard_set(shards)
    _ = load_tokenizer(tokenizer_folder()).fingerprint
    section = DataSection(
        sources=(SourceSection(path=str(folder)),), sequence_length=1024, order="shuffled", verify="off"
    )
    reset_peak_memory()
    before = peak_memory_mb()
    start = time.perf_counter()
    data = open_training_data(section, BatchSection(tokens_per_step=8 * 1024), 1)
    opened = time.perf_counter() - start
    with Loader(data, 0, 1, 8, prefetch=0) as loader:
        loader.batch(0)
    return {"opened": opened, "first": time.perf_counter() - start, "memory": peak_memory_mb() - before}


BENCHMARK = Benchmark(
    name="open_tokens",
    module="benchmarks.open_tokens",
    contestants={name: (lambda point, shards=shards: measure(shards)) for name, shards in SETS.items()},  # type: ignore[misc]
    points={"sparse": "Opening shard sets of 134 MB a shard, shuffled, 8 rows of 1,024 tokens"},
    columns=(
        Column("opened", "seconds to open", ".3f"),
        Column("first", "seconds to the first batch", ".3f"),
        Column("memory", "more MB", ",.1f"),
    ),
    relative_to="10 GB",
    higher_is_better=False,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
