"""Fine-tuning on real conversations: packed rows beside random order padded to the longest of the micro-batch.

Both compute at most ROWS x LENGTH tokens a micro-batch, train the same model with the same loss and optimizer, a step a
micro-batch, and go once through the same conversations. Making the batches out of rendered conversations counts,
rendering does not (benchmarks/render.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Benchmark, Column, main, peak_memory_mb, reset_peak_memory
from benchmarks.texts import SHARED

CONVERSATIONS = SHARED / "data/chat/oasst_conversations.jsonl"
CACHE = Path(tempfile.gettempdir()) / "argonne-benchmark-packing"
LENGTH, ROWS, VOCABULARY = 1024, 8, 2048
EVERY, WARM_UP = 3, 2  # of the conversations: a few minutes a round

# A micro-batch and the targets in it.
Step = tuple[dict[str, Any], int]


def open_data() -> Any:
    """The conversations, rendered once; longer ones than a row are left out for both."""
    from argonne.config import BatchSection, SourceSection
    from argonne.data.chat_data import open_conversations
    from argonne.tokens.tokenizer import load_tokenizer, train_tokenizer

    lines = CONVERSATIONS.read_text().splitlines()
    tokenizer, some = CACHE / "tokenizer", CACHE / "some.jsonl"
    if not tokenizer.exists():
        texts = (turn["content"] for line in lines for turn in json.loads(line)["messages"])
        train_tokenizer(texts, VOCABULARY, tokenizer)
    if not some.exists():
        some.write_text("\n".join(lines[::EVERY]) + "\n")
    return open_conversations(
        [SourceSection(path=str(some), max_epochs=9)],
        tokenizer=load_tokenizer(tokenizer),
        sequence_length=LENGTH,
        cache=CACHE / "rendered",
        batch=BatchSection(tokens_per_step=ROWS * LENGTH),
        seed=1,
    )


def packed() -> Iterator[Step]:
    """Of one epoch, as a run reads it; the last step goes on into the next epoch where rows are left over."""
    from argonne.data.loader import Loader

    data = open_data()
    with Loader(data, 0, 1, ROWS, prefetch=0) as loader:
        for step in range(-(-data.tokens_per_epoch // (ROWS * LENGTH))):
            batch = loader.batch(step)
            (micro,) = batch.micro_batches
            yield dict(micro), batch.count


def padded() -> Iterator[Step]:
    """Of one epoch in random order: as many of the next conversations as fit into the budget, padded on the right to
    the longest. Attention keeps padding apart from text, as an attention mask makes it.
    """
    data = open_data()
    ends = np.asarray(data.rendered[0].ends["train"])
    begins = np.concatenate([[0], ends[:-1]])
    taken: list[int] = []
    longest = 0
    for number in np.random.default_rng(1).permutation(len(ends)).tolist():
        length = int(ends[number] - begins[number])
        if (len(taken) + 1) * max(longest, length) > ROWS * LENGTH:
            yield _padded_rows(data, [(int(begins[one]), int(ends[one])) for one in taken], longest)
            taken, longest = [], 0
        taken, longest = [*taken, number], max(longest, length)
    yield _padded_rows(data, [(int(begins[one]), int(ends[one])) for one in taken], longest)


def _padded_rows(data: Any, places: list[tuple[int, int]], length: int) -> Step:
    import torch

    from argonne.data.rendered import TRAINED
    from argonne.data.windows import IGNORED

    inputs = np.zeros((len(places), length), np.int64)
    labels = np.full((len(places), length), IGNORED, np.int64)
    positions = np.tile(np.arange(length), (len(places), 1))
    for row, (begin, end) in enumerate(places):
        marked = np.empty(end - begin, np.uint32)
        data.rendered[0].train.copy(begin, marked)
        ids = (marked & ~TRAINED).astype(np.int64)
        inputs[row, : len(ids)] = ids
        labels[row, : len(ids) - 1] = np.where(marked[1:] & TRAINED, ids[1:], IGNORED)
        positions[row, len(ids) :] = np.arange(length - len(ids))
    count = int((labels != IGNORED).sum())
    arrays = {"input_ids": inputs, "shift_labels": labels, "position_ids": positions}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, count


def train(steps: Iterator[Step], epoch: Iterator[Step]) -> dict[str, float]:
    """Targets a second over `epoch`, after WARM_UP of the `steps`."""
    import torch

    from argonne.model.build import build_model, config_from_fields
    from argonne.parallel.mesh import Mesh
    from argonne.parallel.parallelise import in_one_call
    from argonne.plan import choose_setup, running_device
    from argonne.recipe import load_recipe
    from argonne.stages.setup import configure_model
    from argonne.stages.start import architecture_fields
    from argonne.train.objectives import next_token
    from argonne.train.optim import Precision, build_optimizer

    recipe = load_recipe(
        "nano-3.0", {"model.max_position_embeddings": str(LENGTH), "data.sequence_length": str(LENGTH)}
    )
    model: Any = build_model(config_from_fields(architecture_fields(recipe.model)), seed=0).train()
    configure_model(model, recipe, choose_setup(recipe, running_device("cpu")))
    mesh = Mesh(torch.device("cpu"))
    precision = Precision("fp32", mesh.device)
    parallelised = in_one_call(model, model, mesh, next_token, precision)
    optimizer = build_optimizer(model, recipe.optim, mesh)

    def step(micro: dict[str, Any], count: int) -> None:
        parallelised.forward_backward([micro], count)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        precision.step(optimizer, norm)
        optimizer.zero_grad(set_to_none=True)

    for _, (micro, count) in zip(range(WARM_UP), steps, strict=False):
        step(micro, count)
    reset_peak_memory()
    trained = computed = 0
    start = time.perf_counter()
    for micro, count in epoch:
        step(micro, count)
        trained, computed = trained + count, computed + micro["input_ids"].numel()
    seconds = time.perf_counter() - start
    return {"rate": trained / seconds, "share": 100 * trained / computed, "peak": peak_memory_mb()}


BENCHMARK = Benchmark(
    name="packing",
    module="benchmarks.packing",
    contestants={
        "argonne, packed rows": lambda _: train(packed(), packed()),
        "random order, padded to the longest": lambda _: train(padded(), padded()),
    },
    points={
        "oasst": f"Every {EVERY}rd OASST conversation, nano-3.0 with a vocabulary of {VOCABULARY:,}, at most "
        f"{ROWS} x {LENGTH:,} tokens a micro-batch, fp32"
    },
    columns=(
        Column("rate", "trained tokens/s"),
        Column("share", "% of the computed tokens trained", ".1f"),
        Column("peak", "peak memory, MB"),
    ),
    relative_to="random order, padded to the longest",
    needs=CONVERSATIONS,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
