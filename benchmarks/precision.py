"""A training step on a CPU in fp32 and under bf16 autocast, at two sizes that `argonne train` would take: what
`train.precision = "auto"` is a rule for. With AdamW: Muon's own products are the same in both, and weigh less in the
larger steps that are trained with it.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.harness import Benchmark, Column, main, peak_memory_mb, reset_peak_memory

# vocabulary, hidden size, layers, heads, key-value heads, MLP; rows of 512 tokens, 8 a step
SIZES = {"10M": (4096, 320, 7, 5, 1, 1024), "40M": (8192, 576, 10, 9, 3, 1536)}
ROWS, LENGTH, STEPS = 8, 512, 4


def measure(point: str, precision: str) -> dict[str, float]:
    import torch

    from argonne.config import BatchSection, DataSection, ModelSection, Recipe, TrainSection
    from argonne.plan.sizes import ARCHITECTURE
    from argonne.stages.trial import timed_steps

    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = dict(zip((*names, "intermediate_size"), SIZES[point], strict=True))
    recipe = Recipe(
        model=ModelSection(**{**ARCHITECTURE, **sizes, "head_dim": 64, "max_position_embeddings": LENGTH}),
        data=DataSection(sequence_length=LENGTH),
        batch=BatchSection(ROWS * LENGTH, micro=ROWS),
        train=TrainSection(steps=1_000_000, precision=precision),
    )
    ids = torch.randint(0, SIZES[point][0], (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        seconds = timed_steps(recipe, ids, Path(folder), STEPS, after_first=reset_peak_memory)
    return {"rate": ROWS * LENGTH / seconds, "peak": peak_memory_mb()}


BENCHMARK = Benchmark(
    name="precision",
    module="benchmarks.precision",
    contestants={precision: partial(measure, precision=precision) for precision in ("bf16", "fp32")},
    points={
        point: f"{point} parameters, hidden size {sizes[1]}, vocabulary {sizes[0]:,}, {ROWS} x {LENGTH} tokens a step, "
        "AdamW"
        for point, sizes in SIZES.items()
    },
    columns=(Column("rate", "tokens/s"), Column("peak", "peak memory, MB")),
    relative_to="fp32",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
