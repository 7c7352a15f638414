"""Windows of 8 x 1,025 tokens from 2 GB of uint32 shards as int64 inputs and targets, on one core: million tokens a
second.

`argonne` is the whole loader of a run: order, batch and all. litdata is measured where it is installed.
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

from benchmarks.harness import Benchmark, Column, main, peak_memory_mb, reset_peak_memory
from benchmarks.texts import tokenizer_folder, use_own_cache

TOKENS, LENGTH, ROWS, BATCHES = 512 * 2**20, 1024, 8, 4000
HEADER = 1024


def shard() -> Path:
    """One file of random tokens with our header, made once."""
    from argonne.tokens.shards import header

    path = Path(tempfile.gettempdir()) / "argonne-benchmark-windows.bin"
    if not path.exists() or path.stat().st_size != HEADER + 4 * TOKENS:
        generator = np.random.default_rng(0)
        with open(path, "wb") as file:
            file.write(header("uint32", TOKENS))
            for _ in range(64):
                file.write(generator.integers(0, 10_000, TOKENS // 64, dtype=np.uint32).tobytes())
    return path


def rate(next_batch: Callable[[int], Any]) -> dict[str, float]:
    """Tokens of targets a second over batches 1 .. BATCHES, after the file has been read once into the page cache."""
    with open(shard(), "rb") as file:
        while file.read(1 << 24):
            pass
    next_batch(0)
    reset_peak_memory()
    start = time.perf_counter()
    for number in range(1, BATCHES + 1):
        next_batch(number)
    return {"rate": BATCHES * ROWS * LENGTH / (time.perf_counter() - start) / 1e6, "peak": peak_memory_mb()}


def ours(order: str) -> dict[str, float]:
    from argonne.config import BatchSection, DataSection, SourceSection
    from argonne.data.dataset import open_training_data
    from argonne.data.loader import Loader

    sources = (SourceSection(path=str(shard())),)
    section = DataSection(
        sources=sources, tokenizer=str(tokenizer_folder()), sequence_length=LENGTH, order=order, verify="off"
    )
    with Loader(
        open_training_data(section, BatchSection(tokens_per_step=ROWS * LENGTH), 1), 0, 1, ROWS, prefetch=0
    ) as loader:
        return rate(loader.batch)


def mapped() -> np.ndarray:
    return np.memmap(shard(), dtype=np.uint32, mode="r", offset=HEADER)


def naive(_point: str) -> dict[str, float]:
    import torch

    data = mapped()

    def next_batch(number: int) -> Any:
        starts = np.random.default_rng(number).integers(0, TOKENS // LENGTH - 1, ROWS) * LENGTH
        window = np.stack([data[start : start + LENGTH + 1].astype(np.int64) for start in starts])
        return torch.from_numpy(window[:, :-1]).contiguous(), torch.from_numpy(window[:, 1:]).contiguous()

    return rate(next_batch)


def nanogpt(_point: str) -> dict[str, float]:
    """nanoGPT's get_batch: the file mapped anew for each batch, random crops."""
    import torch

    def next_batch(_: int) -> Any:
        data = mapped()
        offsets = torch.randint(TOKENS - LENGTH - 1, (ROWS,))
        inputs = torch.stack([torch.from_numpy(data[start : start + LENGTH].astype(np.int64)) for start in offsets])
        targets = torch.stack(
            [torch.from_numpy(data[start + 1 : start + 1 + LENGTH].astype(np.int64)) for start in offsets]
        )
        return inputs, targets

    return rate(next_batch)


def torch_dataloader(_point: str) -> dict[str, float]:
    import torch

    class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        data = mapped()

        def __len__(self) -> int:
            return TOKENS // LENGTH - 1

        def __getitem__(self, number: int) -> Any:
            window = torch.from_numpy(self.data[number * LENGTH : number * LENGTH + LENGTH + 1].astype(np.int64))
            return window[:-1], window[1:]

    loader = torch.utils.data.DataLoader(
        Windows(), batch_size=ROWS, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    batches = iter(loader)
    return rate(lambda _: next(batches))


def litdata(_point: str) -> dict[str, float]:
    """litdata's streaming dataset over chunks of its own format made from the same tokens, read in this process."""
    import torch

    use_own_cache()
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    from benchmarks import read_windows

    folder = Path(tempfile.gettempdir()) / "argonne-benchmark-litdata"
    if not (folder / "index.json").exists():
        loader = TokensLoader(block_size=LENGTH + 1)
        optimize(
            read_windows._litdata_tokens,
            list(range(64)),
            str(folder),
            num_workers=1,
            chunk_bytes="64MB",
            item_loader=loader,
        )
    dataset = StreamingDataset(
        str(folder), item_loader=TokensLoader(block_size=LENGTH + 1), shuffle=True, drop_last=True
    )
    batches = iter(StreamingDataLoader(dataset, batch_size=ROWS, num_workers=0))

    def next_batch(_: int) -> Any:
        window = next(batches).to(torch.int64)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    return rate(next_batch)


def _litdata_tokens(number: int) -> Any:
    import torch

    size = TOKENS // 64
    yield torch.from_numpy(mapped()[number * size : (number + 1) * size].astype(np.int32))


def memory_copy(_point: str) -> dict[str, float]:
    """The limit: inputs and targets copied from memory that is already int64."""
    source = np.ones((ROWS, LENGTH + 1), np.int64)
    inputs, targets = np.empty((ROWS, LENGTH), np.int64), np.empty((ROWS, LENGTH), np.int64)

    def next_batch(_: int) -> None:
        np.copyto(inputs, source[:, :-1])
        np.copyto(targets, source[:, 1:])

    return rate(next_batch)


def on_one_core(contestant: Callable[[str], dict[str, float]]) -> Callable[[str], dict[str, float]]:
    def pinned(point: str) -> dict[str, float]:
        shard()
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        return contestant(point)

    return pinned


CONTESTANTS: dict[str, Callable[[str], dict[str, float]]] = {
    "argonne, shuffled": lambda _: ours("shuffled"),
    "argonne, sequential": lambda _: ours("sequential"),
    "numpy, random windows": naive,
    "nanoGPT get_batch": nanogpt,
    "torch DataLoader, shuffled": torch_dataloader,
    **({"litdata, shuffled": litdata} if importlib.util.find_spec("litdata") else {}),
    "memory copy": memory_copy,
}

BENCHMARK = Benchmark(
    name="read_windows",
    module="benchmarks.read_windows",
    contestants={name: on_one_core(contestant) for name, contestant in CONTESTANTS.items()},
    points={
        "windows": (
            "Million tokens a second as int64 inputs and targets, 8 x 1,024, one core, 2 GB of shards in the page cache"
        )
    },
    columns=(Column("rate", "million tokens/s", ",.1f"), Column("peak", "peak MB")),
    relative_to="torch DataLoader, shuffled",
    limit="memory copy",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
