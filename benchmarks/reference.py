"""A step of preference tuning on real pairs: the reference's scores made once, made live by a second model on the same
rows, and live in TRL's DPOTrainer on padded ones.

All train the same model with the same loss and a fused AdamW, without activation checkpointing, a step of the same
number of pairs on average and at most ROWS x LENGTH tokens at once; after WARM_UP steps the pairs of STEPS are timed.
The pass that makes the scores is told beside them: it is one forward of every pair, so that in a run of E epochs what
is saved is that of E - 1.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark, Column, main, peak_memory_mb, reset_peak_memory
from benchmarks.texts import SHARED

PAIRS = SHARED / "data/preference/oasst_pairs.jsonl"
CACHE = Path(tempfile.gettempdir()) / "argonne-benchmark-reference"
LENGTH, ROWS, WORDS = 1024, 4, 2048
STEPS, WARM_UP = 8, 2
# Point -> train.loss, entries of the embedding table, of the model.
SHAPES: dict[str, dict[str, str]] = {
    "whole": {"train.loss": "full", "model.vocab_size": "2048"},
    "chunked": {"train.loss": "chunked", "model.vocab_size": "2048"},
    "head": {"train.loss": "full", "model.vocab_size": "16384"},
}


def source() -> Path:
    """The pairs that fit into a row, and a tokenizer made of them; written once."""
    from argonne.tokens.tokenizer import load_tokenizer, train_tokenizer

    file = CACHE / "pairs.jsonl"
    if not file.exists():
        lines = PAIRS.read_text().splitlines()
        texts = [turn["content"] for line in lines for side in json.loads(line).values() for turn in side]
        tokenizer = load_tokenizer(train_tokenizer(texts, WORDS, CACHE / "tokenizer"))
        file.write_text("".join(f"{line}\n" for line in lines if len(tokenizer.encode(line)) < 0.8 * LENGTH))
    return file


def open_pairs() -> Any:
    """The pairs as `argonne dpo` reads them, in rows of LENGTH."""
    from argonne.config import BatchSection, SourceSection
    from argonne.data.chat_data import open_conversations
    from argonne.data.pair_data import PairData
    from argonne.tokens.tokenizer import load_tokenizer

    return open_conversations(
        [SourceSection(path=str(source()), max_epochs=99)],
        PairData,
        tokenizer=load_tokenizer(CACHE / "tokenizer"),
        sequence_length=LENGTH,
        cache=CACHE / "rendered",
        batch=BatchSection(tokens_per_step=ROWS * LENGTH),
        seed=1,
    )


def make_model(point: str) -> Any:
    """nano-3.0 with the point's loss and vocabulary, the same weights each time, its kernels and loss chosen."""
    from argonne.model.build import build_model, config_from_fields
    from argonne.plan import choose_setup, running_device
    from argonne.recipe import load_recipe
    from argonne.stages.setup import configure_model
    from argonne.stages.start import architecture_fields

    sizes = {"model.max_position_embeddings": str(LENGTH), "data.sequence_length": str(LENGTH)}
    more = {"batch.tokens_per_step": str(ROWS * LENGTH), "train.activation_checkpointing": "none"}
    recipe = load_recipe("nano-3.0", {**sizes, **more, **SHAPES[point]})
    model = build_model(config_from_fields(architecture_fields(recipe.model)), seed=0).train()
    configure_model(model, recipe, choose_setup(recipe, running_device("cpu")))
    return model, recipe


def ours(point: str, *, live: bool) -> dict[str, float]:
    """Pairs a second of our step. live: a second model scores each micro-batch before it."""
    import torch

    from argonne.config import DpoSection
    from argonne.data.loader import Loader
    from argonne.data.pair_data import Reference
    from argonne.parallel.mesh import Mesh
    from argonne.parallel.parallelise import in_one_call
    from argonne.stages.dpo import scores
    from argonne.train.optim import Precision, build_optimizer
    from argonne.train.preference import preference

    model, recipe = make_model(point)
    mesh = Mesh(torch.device("cpu"))
    precision, objective = Precision("fp32", mesh.device), preference(DpoSection(beta=0.1))
    trained = in_one_call(model, model, mesh, objective, precision)
    optimizer = build_optimizer(model, recipe.optim, mesh)
    other = make_model(point)[0].eval()
    reference = in_one_call(other, other, mesh, objective, precision) if live else None
    data = open_pairs()
    found: dict[str, float] = {}
    if not live:
        with tempfile.TemporaryDirectory() as folder:  # made anew in each round, to be timed
            data.reference = Reference(Path(folder), "benchmark", False, scores)
            start = time.perf_counter()
            data.attach(trained, mesh)
            found["pass"] = time.perf_counter() - start

    def step(micro: dict[str, Any]) -> None:
        if reference is not None:
            micro["reference"] = torch.from_numpy(scores(reference, micro))
        trained.forward_backward([micro], int(micro["pairs"].sum()))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        precision.step(optimizer, norm)
        optimizer.zero_grad(set_to_none=True)

    pairs, start = 0, 0.0
    with Loader(data, 0, 1, ROWS, prefetch=0) as loader:
        for number in range(WARM_UP + STEPS):
            if number == WARM_UP:
                reset_peak_memory()
                pairs, start = 0, time.perf_counter()
            batch = loader.batch(number)
            step(dict(batch.micro_batches[0]))
            pairs += batch.count
    seconds = time.perf_counter() - start
    return {"rate": pairs / seconds, **found, "peak": peak_memory_mb()}


def model_folder(point: str) -> Path:
    """The same model with its tokenizer and template, as transformers loads it."""
    from argonne.data.chat import ChatTemplate
    from argonne.layout import CHAT_TEMPLATE
    from argonne.model.save import save_model_folder
    from argonne.tokens.tokenizer import load_tokenizer

    folder = CACHE / f"model-{point}"
    if not folder.exists():
        source()
        tokenizer = load_tokenizer(CACHE / "tokenizer")
        folder.mkdir()
        tokenizer.save(folder)
        save_model_folder(make_model(point)[0], folder, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        (folder / CHAT_TEMPLATE).write_text(ChatTemplate(tokenizer, "chatml", "drop").jinja)
    return folder


def trl(point: str) -> dict[str, float]:
    """Pairs a second of TRL's DPOTrainer: ROWS sequences of a micro-batch, padded to its longest, as many micro-batches
    a step as make up our number of pairs.
    """
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    folder, data = model_folder(point), open_pairs()
    a_step = data.rendered[0].account.used / (data.tokens_per_epoch / (ROWS * LENGTH))
    at_once = max(1, ROWS // 2)  # a pair is two sequences
    together = max(1, round(a_step / at_once))
    moments: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            moments.append(time.perf_counter())
            if len(moments) == WARM_UP:
                reset_peak_memory()

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True, dtype=torch.float32)

    with tempfile.TemporaryDirectory() as out:
        how = DPOConfig(
            output_dir=out,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=together,
            max_steps=WARM_UP + STEPS,
            max_length=None,
            beta=0.1,
            learning_rate=3e-3,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        pairs = load_dataset("json", data_files=str(source()), split="train", cache_dir=out)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        named = {"args": how, "train_dataset": pairs, "processing_class": tokenizer, "callbacks": [Clock()]}
        DPOTrainer(model=model(), ref_model=model(), **named).train()
    return {"rate": STEPS * at_once * together / (moments[-1] - moments[WARM_UP - 1]), "peak": peak_memory_mb()}


CACHED, LIVE, TRL = "argonne, cached reference", "argonne, live reference", "TRL DPOTrainer, live reference"
BENCHMARK = Benchmark(
    name="reference",
    module="benchmarks.reference",
    contestants={CACHED: partial(ours, live=False), LIVE: partial(ours, live=True), TRL: trl},
    points={
        name: f"OASST pairs, nano-3.0, {shape['train.loss']} loss, {int(shape['model.vocab_size']):,} entries in the "
        f"vocabulary, at most {ROWS} x {LENGTH:,} tokens at once, fp32"
        for name, shape in SHAPES.items()
    },
    columns=(
        Column("rate", "pairs/s", ".2f"),
        Column("pass", "pass over all pairs, s", ".1f"),
        Column("peak", "peak memory, MB"),
    ),
    relative_to=LIVE,
    needs=PAIRS,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
