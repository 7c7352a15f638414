"""What the loop costs over bare forward + backward + clip + optimizer, at nano size, where a step is shortest."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark, Column, main

STEPS, ROWS, LENGTH = 40, 16, 256


def _recipe() -> Any:
    from argonne.recipe import load_recipe

    return load_recipe(
        "nano-3.0", {"batch.micro": str(ROWS), "log.every_steps": "1000000", "checkpoint.every_minutes": "0"}
    )


def _ids() -> Any:
    import torch

    return torch.randint(0, 2048, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def loop(_point: str) -> dict[str, float]:
    from argonne.stages.trial import timed_steps

    with tempfile.TemporaryDirectory() as folder:
        seconds = timed_steps(_recipe(), _ids(), Path(folder), STEPS, warm_up=4)
    return {"milliseconds": 1000 * seconds}


def bare(_point: str) -> dict[str, float]:
    import torch

    from argonne.model.build import build_model, config_from_fields
    from argonne.plan import choose_setup, running_device
    from argonne.stages.setup import configure_model
    from argonne.stages.start import architecture_fields

    recipe, ids = _recipe(), _ids()
    model: Any = build_model(config_from_fields(architecture_fields(recipe.model)), seed=0).train()
    configure_model(model, recipe, choose_setup(recipe, running_device("cpu")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> float:
        start = time.perf_counter()
        loss = model(input_ids=inputs, shift_labels=labels, use_cache=False, loss_reduction="sum").loss / labels.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    for _ in range(4):
        step()
    return {"milliseconds": 1000 * statistics.median(step() for _ in range(STEPS))}


BENCHMARK = Benchmark(
    name="overhead",
    module="benchmarks.overhead",
    contestants={"bare step": bare, "argonne's loop": loop},
    points={"nano": "nano-3.0, 16 rows of 256 tokens, fp32, two threads"},
    columns=[Column("milliseconds", "ms a step", ",.2f")],
    relative_to="bare step",
    higher_is_better=False,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
