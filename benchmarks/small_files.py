"""A folder of 100,000 files of 2 KB beside one file of the same texts, through `argonne prepare` with the reference
encoder on all cores, start-up included.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark, Column, main
from benchmarks.prepare_tokens import measured
from benchmarks.texts import parquet_file, tokenizer_folder

FILES, BYTES = 100_000, 2_000
CACHE = Path(tempfile.gettempdir()) / "argonne-benchmark-small-files"


def corpus() -> Path:
    """`many/NNN/NNNNNN.txt` and the same texts in `one.jsonl`, made once: pieces of the shared books."""
    if not (CACHE / "done").exists():
        import pyarrow.parquet as parquet

        whole = "".join(parquet.read_table(parquet_file(1.0, 8), columns=["text"])["text"].to_pylist())
        with_lines = tempfile.mkdtemp(dir=CACHE.parent)
        with open(Path(with_lines) / "one.jsonl", "w") as lines:
            for number in range(FILES):
                start = number * BYTES % (len(whole) - BYTES)
                folder = Path(with_lines) / f"many/{number // 1000:03d}"
                folder.mkdir(parents=True, exist_ok=True)
                text = whole[start : start + BYTES]
                (folder / f"{number:06d}.txt").write_text(text)
                lines.write(json.dumps({"text": text}) + "\n")
        (Path(with_lines) / "done").touch()
        Path(with_lines).rename(CACHE)
    return CACHE


def prepared(name: str) -> dict[str, float]:
    from argonne.prepare.options import PrepareOptions
    from argonne.prepare.prepare import prepare
    from argonne.prepare.progress import ProgressBar

    def work(path: Path, folder: Path) -> Any:
        options = PrepareOptions((str(path),), folder / "tokens", tokenizer_folder(), encoder="tokenizers")
        return prepare(options, ProgressBar("prepare", 0, None))

    return measured(work, corpus() / name, FILES * BYTES / 1e6)


BENCHMARK = Benchmark(
    name="small_files",
    module="benchmarks.small_files",
    contestants={"one file": lambda _: prepared("one.jsonl"), "100,000 files": lambda _: prepared("many")},
    points={"books": "MB/s of text to token shards, all cores (peak: all its processes together)"},
    columns=(Column("rate", "MB/s", ",.1f"), Column("peak", "peak MB")),
    relative_to="one file",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
