"""Model FLOPs utilisation on one CUDA device: 2.5 and 3.0 at their size, sequence 1,024, bf16, beside a compiled plain
Llama loop.

Each contestant runs at the largest micro-batch that it can hold, found by halving. FLOPs a token and the device's peak
are those of `argonne plan`, the same for all contestants of one shape.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark, Column
from benchmarks.harness import main as run_benchmark

LENGTH, STEPS, WARM_UP = 1024, 10, 3
LARGEST_ROWS = 16
PRESETS = {"2.5": "argonne-2.5", "3.0": "argonne-3.0"}


def shape_of_preset(name: str, rows: int) -> dict[str, int]:
    from argonne.presets import preset

    fields = preset(name).fields
    shape = {
        "vocab": fields["vocab_size"],
        "hidden": fields["hidden_size"],
        "layers": fields["num_hidden_layers"],
        "heads": fields["num_attention_heads"],
        "kv_heads": fields["num_key_value_heads"],
        "head_dim": fields["head_dim"],
        "mlp": fields["intermediate_size"],
        "length": LENGTH,
        "rows": rows,
    }
    return {**shape, "window": fields["sliding_window"]} if fields["sliding_window"] else shape


def at_largest_rows(step: Callable[[int], float]) -> dict[str, float]:
    """Seconds a step at the largest power of two of rows that fits; only an out-of-memory error halves, anything else
    is raised.
    """
    import gc

    import torch

    rows = LARGEST_ROWS
    while rows:
        try:
            torch.cuda.reset_peak_memory_stats()
            seconds = step(rows)
        except torch.cuda.OutOfMemoryError:
            rows //= 2
        else:
            return {"rows": rows, "seconds": seconds, "peak_mb": torch.cuda.max_memory_allocated() / 2**20}
        gc.collect()
        torch.cuda.empty_cache()
    raise RuntimeError("not even one row fits into this device's memory")


def with_use(point: str, found: dict[str, float]) -> dict[str, float]:
    """Add tokens/s and the share of the device's dense bf16 peak."""
    import torch

    from argonne.plan import device_peak_flops, flops_per_token
    from benchmarks.own_loop import make_recipe

    recipe = make_recipe(PRESETS[point], shape_of_preset(PRESETS[point], 1))
    speed = found["rows"] * LENGTH / found["seconds"]
    peak = device_peak_flops(torch.cuda.get_device_name(0), "bf16")
    return {
        **found,
        "tokens_per_second": speed,
        **({"mfu": speed * flops_per_token(recipe.model, LENGTH) / peak} if peak else {}),
    }


def argonne(point: str) -> dict[str, float]:
    """The project's own loop, as `argonne pretrain` would run the preset on one device."""
    import torch

    from argonne.stages.trial import timed_steps
    from benchmarks.own_loop import make_recipe

    def step(rows: int) -> float:
        shape = shape_of_preset(PRESETS[point], rows)
        recipe = make_recipe(PRESETS[point], shape, precision="bf16")
        ids = torch.randint(0, shape["vocab"], (rows, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as folder:
            return timed_steps(recipe, ids, Path(folder), STEPS, warm_up=WARM_UP, device="cuda")

    return with_use(point, at_largest_rows(step))


def compiled_llama(point: str) -> dict[str, float]:
    """What one writes first on a GPU: LlamaForCausalLM of the same sizes, torch.compile, bf16 autocast, fused AdamW."""
    import torch

    from benchmarks.train_step import llama

    def step(rows: int) -> float:
        shape = shape_of_preset(PRESETS[point], rows)
        with torch.device("cuda"):
            model: Any = llama(shape)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        compiled = torch.compile(model)
        ids = torch.randint(0, shape["vocab"], (rows, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()

        def once() -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = compiled(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for _ in range(WARM_UP):
            once()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            once()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / STEPS

    return with_use(point, at_largest_rows(step))


BENCHMARK = Benchmark(
    name="mfu",
    module="benchmarks.mfu",
    contestants={"argonne": argonne, "LlamaForCausalLM, compiled": compiled_llama},
    points={
        "2.5": "2.5 (1.27B), sequence 1,024, bf16",
        "3.0": "3.0 (2.88B), sequence 1,024, bf16; Llama of the same sizes",
    },
    columns=(
        Column("tokens_per_second", "tokens/s"),
        Column("mfu", "MFU", ".1%"),
        Column("rows", "rows a micro-batch"),
        Column("peak_mb", "peak memory, MB"),
    ),
    relative_to="LlamaForCausalLM, compiled",
)


def main(arguments: Sequence[str]) -> int:
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device here: nothing measured", file=sys.stderr)
        return 2
    return run_benchmark(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
