"""One full training step: forward, backward, clipping of the global gradient norm, AdamW. This project beside what a
user would pick instead.

`python -m benchmarks.train_step` on the CPU in fp32; `--gpu` measures model FLOPs utilisation of 2.5 and 3.0 at their
size (benchmarks/mfu.py).
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark, Column, main, median_seconds, peak_memory_mb, reset_peak_memory

SHAPES: dict[str, dict[str, int]] = {
    "vocabulary_4096": {
        "vocab": 4096,
        "hidden": 256,
        "layers": 6,
        "heads": 8,
        "kv_heads": 4,
        "mlp": 1664,
        "length": 512,
        "rows": 8,
        "steps": 3,
    },
    "vocabulary_151669": {
        "vocab": 151669,
        "hidden": 256,
        "layers": 4,
        "heads": 8,
        "kv_heads": 4,
        "mlp": 768,
        "length": 512,
        "rows": 4,
        "steps": 2,
    },
}


def token_ids(shape: dict[str, int]) -> Any:
    import torch

    return torch.randint(
        0, shape["vocab"], (shape["rows"], shape["length"] + 1), generator=torch.Generator().manual_seed(0)
    )


def llama(shape: dict[str, int]) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["hidden"] // shape["heads"],
        intermediate_size=shape["mlp"],
        max_position_embeddings=shape["length"],
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


def plain_loop(point: str, fused: bool | None = None) -> dict[str, float]:
    """What one writes first: `loss.backward()`, `clip_grad_norm_`, `AdamW.step()`."""
    import torch

    shape = SHAPES[point]
    model, ids = llama(shape), token_ids(shape)[:, :-1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    reset_peak_memory()
    seconds = median_seconds(step, shape["steps"])
    return {"tokens_per_second": ids.numel() / seconds, "peak_mb": peak_memory_mb()}


def hugging_face_trainer(point: str) -> dict[str, float]:
    import transformers

    shape = SHAPES[point]
    model, ids = llama(shape), token_ids(shape)[:, :-1]
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                reset_peak_memory()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shape["rows"],
            max_steps=shape["steps"] + 1,
            learning_rate=3e-4,
            weight_decay=0.1,
            max_grad_norm=1.0,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in ids] * 64
        transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    gaps = sorted(late - early for early, late in itertools.pairwise(ends))
    return {"tokens_per_second": ids.numel() / gaps[len(gaps) // 2], "peak_mb": peak_memory_mb()}


def argonne(point: str, preset: str) -> dict[str, float]:
    """The project's own loop (argonne.train.trainer) on the same shape, with a batch that lies in memory."""
    from argonne.stages.trial import timed_steps
    from benchmarks.own_loop import make_recipe

    shape = SHAPES[point]
    recipe = make_recipe(preset, shape)
    with tempfile.TemporaryDirectory() as folder:
        seconds = timed_steps(recipe, token_ids(shape), Path(folder), shape["steps"], after_first=reset_peak_memory)
    return {"tokens_per_second": shape["rows"] * shape["length"] / seconds, "peak_mb": peak_memory_mb()}


BENCHMARK = Benchmark(
    name="train_step",
    module="benchmarks.train_step",
    contestants={
        "argonne, 2.x architecture": lambda point: argonne(point, "nano-2.5"),
        "argonne, 3.0 architecture": lambda point: argonne(point, "nano-3.0"),
        "LlamaForCausalLM, plain loop": plain_loop,
        "LlamaForCausalLM, fused AdamW": lambda point: plain_loop(point, fused=True),
        "Hugging Face Trainer": hugging_face_trainer,
    },
    points={
        "vocabulary_4096": "Vocabulary 4,096: hidden 256, 6 layers, 8 x 512 tokens a step, fp32",
        "vocabulary_151669": "Vocabulary 151,669: hidden 256, 4 layers, 4 x 512 tokens a step, fp32",
    },
    columns=(Column("tokens_per_second", "tokens/s"), Column("peak_mb", "peak memory, MB")),
    relative_to="LlamaForCausalLM, plain loop",
)

if __name__ == "__main__":
    if "--gpu" in sys.argv[1:]:
        from benchmarks import mfu

        sys.exit(mfu.main([argument for argument in sys.argv[1:] if argument != "--gpu"]))
    sys.exit(main(BENCHMARK))
