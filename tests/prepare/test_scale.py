"""Memory stays flat: large files and large documents, each in a process of its own whose peak is measured."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from argonne.tokens.formats import open_tokens
from tests.tokensets import words

LARGEST_PEAK = 1.5e9
COMMAND = """
import resource, sys
from pathlib import Path
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
if __name__ == "__main__":
    prepare(PrepareOptions((sys.argv[1],), Path(sys.argv[2]), Path(sys.argv[3]), workers=int(sys.argv[4])))
    own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024)
"""


def peak_of_preparing(source: Path, out: Path, tokenizer: Path, workers: int) -> float:
    """Largest resident memory of any process of `argonne prepare`, in bytes (VmHWM: what getrusage says of itself
    begins with the parent's).
    """
    script = out.parent / "run.py"
    script.write_text(COMMAND)
    command = [sys.executable, str(script), str(source), str(out), str(tokenizer), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def varied_text(shared: Path, size: int, seed: int) -> Iterator[str]:
    """About `size` characters of the shared books, a few paragraphs at a time, in an order that never repeats."""
    books = parquet.read_table(shared / "data/pretrain/books.parquet", columns=["text"])["text"].to_pylist()
    paragraphs = [paragraph for text in books for paragraph in text.split("\n\n") if paragraph.strip()]
    generator, made = random.Random(seed), 0
    while made < size:
        piece = "\n\n".join(generator.choices(paragraphs, k=8))
        made += len(piece)
        yield piece


def test_a_document_of_forty_megabytes_takes_a_few_times_its_own_size(tokenizer_folder: Path, tmp_path: Path) -> None:
    line = f"Beginning {words(4000)}\n"
    peaks = []
    for name, size in (("small", 1_000), ("large", 40_000_000)):
        text = line * max(1, size // len(line.encode()))
        (tmp_path / name).mkdir()
        parquet.write_table(
            pa.table({"text": ["before", text]}),
            tmp_path / name / "in.parquet",
            compression="none",
            use_dictionary=False,
        )
        peaks.append(peak_of_preparing(tmp_path / name / "in.parquet", tmp_path / name / "out", tokenizer_folder, 1))
    assert peaks[1] - peaks[0] < 6 * 40_000_000


@pytest.mark.campaign
def test_a_parquet_file_with_a_document_of_200_megabytes_stays_small_and_exact(shared: Path, tmp_path: Path) -> None:
    gigatoken = pytest.importorskip("gigatoken", reason="gigatoken is an extra: pip install 'argonne[fast]'")
    text = "\n".join(varied_text(shared, 200_000_000, 1))
    parquet.write_table(pa.table({"text": ["before", text, "after"]}), tmp_path / "in.parquet")
    peak = peak_of_preparing(tmp_path / "in.parquet", tmp_path / "out", shared / "tokenizers/qwen3", 1)
    assert peak < LARGEST_PEAK
    opened = open_tokens(tmp_path / "out")
    start, stop = opened.train.document_ends[:2]
    ids = np.zeros(stop - start, dtype=np.int64)
    opened.train.copy(int(start), ids)
    whole = np.asarray(gigatoken.Tokenizer(str(shared / "tokenizers/qwen3/tokenizer.json")).encode(text))
    assert np.array_equal(ids[:-1], whole)


@pytest.mark.campaign
def test_two_gigabytes_of_jsonl_stay_small(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is an extra: pip install 'argonne[fast]'")
    with open(tmp_path / "in.jsonl", "w") as file:
        for text in varied_text(shared, 2_000_000_000, 2):
            file.write(json.dumps({"text": text}) + "\n")
    peak = peak_of_preparing(tmp_path / "in.jsonl", tmp_path / "out", shared / "tokenizers/qwen3", 2)
    assert peak < LARGEST_PEAK
    assert open_tokens(tmp_path / "out").tokens > 300_000_000
