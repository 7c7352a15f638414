"""A folder of 20,000 files of 2 KB beside one file of the same texts, through `argonne prepare` with the reference
encoder on all cores, start-up included. `--files N`: of so many.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark, Column, main
from benchmarks.prepare_tokens import measured
from benchmarks.texts import parquet_file, tokenizer_folder

FILES, BYTES = 20_000, 2_000


def corpus(files: int) -> Path:
    """`many/NNN/NNNNNN.txt` and the same texts in `one.jsonl`, made once: pieces of the shared books."""
    cache = Path(tempfile.gettempdir()) / f"argonne-benchmark-{files}-small-files"
    if not (cache / "done").exists():
        import pyarrow.parquet as parquet

        whole = "".join(parquet.read_table(parquet_file(1.0, 8), columns=["text"])["text"].to_pylist())
        with_lines = tempfile.mkdtemp(dir=cache.parent)
        with open(Path(with_lines) / "one.jsonl", "w") as lines:
            for number in range(files):
                start = number * BYTES % (len(whole) - BYTES)
                folder = Path(with_lines) / f"many/{number // 1000:03d}"
                folder.mkdir(parents=True, exist_ok=True)
                text = whole[start : start + BYTES]
                (folder / f"{number:06d}.txt").write_text(text)
                lines.write(json.dumps({"text": text}) + "\n")
        (Path(with_lines) / "done").touch()
        Path(with_lines).rename(cache)
    return cache


def prepared(name: str, files: int) -> dict[str, float]:
    from argonne.prepare.options import PrepareOptions
    from argonne.prepare.prepare import prepare
    from argonne.prepare.progress import ProgressBar

    def work(path: Path, folder: Path) -> Any:
        options = PrepareOptions((str(path),), folder / "tokens", tokenizer_folder(), encoder="tokenizers")
        return prepare(options, ProgressBar("prepare", 0, None))

    return measured(work, corpus(files) / name, files * BYTES / 1e6)


def benchmark(files: int) -> Benchmark:
    return Benchmark(
        name="small_files",
        module="benchmarks.small_files",
        contestants={
            "one file": lambda point: prepared("one.jsonl", int(point)),
            "as many files": lambda point: prepared("many", int(point)),
        },
        points={str(files): f"MB/s of {files:,} texts to token shards, all cores (peak: all its processes together)"},
        columns=(Column("rate", "MB/s", ",.1f"), Column("peak", "peak MB")),
        relative_to="one file",
        flags="" if files == FILES else f" --files {files}",
    )


BENCHMARK = benchmark(FILES)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--files", type=int, default=FILES)
    options, rest = parser.parse_known_args()
    if "--child" in rest:  # which is told its point only
        options.files = int(rest[rest.index("--point") + 1])
    sys.exit(main(benchmark(options.files), rest))
