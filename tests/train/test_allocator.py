"""Memory that a CPU run gives back at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from argonne.config import TrainSection
from argonne.stages.setup import returns_memory
from argonne.train.allocator import LARGE_RUN

# Keeps every second of many 2 MiB blocks: with a heap the freed ones are holes that stay with the process.
HOLES = """
import sys
from pathlib import Path
import torch
from argonne.train.allocator import return_freed_memory

def held() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024

warm = torch.ones(24 << 18)  # freeing a block of 24 MiB teaches glibc to serve smaller ones from the heap
del warm
if sys.argv[1] == "on":
    assert return_freed_memory()
before = held()
blocks = [torch.ones(2 << 18) for _ in range(100)]
kept = blocks[1::2]
del blocks
print(held() - before)
"""


def test_small_runs_and_gpus_keep_the_heap() -> None:
    assert not returns_memory(TrainSection(), "cpu", LARGE_RUN / 2)
    assert not returns_memory(TrainSection(), "cuda", 10 * LARGE_RUN)
    assert returns_memory(TrainSection(), "cpu", LARGE_RUN)


def test_the_recipe_decides_where_it_says_so() -> None:
    assert returns_memory(TrainSection(return_memory="on"), "cpu", 0)
    assert not returns_memory(TrainSection(return_memory="off"), "cpu", 10 * LARGE_RUN)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and speaks to glibc")
def test_freed_blocks_leave_the_process() -> None:
    held = {
        mode: int(
            subprocess.run([sys.executable, "-c", HOLES, mode], capture_output=True, text=True, check=True).stdout
        )
        for mode in ("on", "off")
    }
    assert held["on"] < 130  # the 100 MiB that are kept
    assert held["off"] > 170  # and the holes between them
