"""Training on a CPU beside another process that keeps a core busy, with and without the look at neighbours that every
run has, and alone.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Benchmark, Column, main

SHAPE = {
    "vocab": 2048,
    "hidden": 128,
    "layers": 4,
    "heads": 4,
    "kv_heads": 1,
    "mlp": 384,
    "length": 256,
    "rows": 16,
}
WARM_UP, STEPS = 8, 12


def measure(busy: bool, looks: bool) -> dict[str, float]:
    import torch

    from argonne.parallel.neighbours import beside_others
    from argonne.stages.trial import timed_steps
    from benchmarks.own_loop import make_recipe

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SHAPE["vocab"], (SHAPE["rows"], SHAPE["length"] + 1), generator=draw)
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        with tempfile.TemporaryDirectory() as folder, beside_others() if looks else contextlib.nullcontext():
            seconds = timed_steps(make_recipe("nano-3.0", SHAPE), ids, Path(folder), STEPS, warm_up=WARM_UP)
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
    return {"rate": SHAPE["rows"] * SHAPE["length"] / seconds}


BENCHMARK = Benchmark(
    name="neighbours",
    module="benchmarks.neighbours",
    contestants={
        "alone": lambda _: measure(busy=False, looks=True),
        "alone, not looking": lambda _: measure(busy=False, looks=False),
        "beside a busy process": lambda _: measure(busy=True, looks=True),
        "beside a busy process, not looking": lambda _: measure(busy=True, looks=False),
    },
    points={"nano": "nano-3.0, 16 rows of 256 tokens, fp32, a thread a core"},
    columns=(Column("rate", "tokens/s"),),
    relative_to="alone, not looking",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
