"""Messages to packed rows: conversations a second and memory, beside the data preparation of TRL's SFTTrainer.

`python -m benchmarks.render [--conversations N]`: N are made up of slices of text, once, into the temporary folder.
TRL gets the first SAMPLE of them, and so do we once more. Both read jsonl, use the same tokenizer and template, mark
the assistant's tokens and pack best fit; to neither imports count.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark, Column, main
from benchmarks.memory import TreeMemory
from benchmarks.texts import documents, tokenizer_folder

CONVERSATIONS, SAMPLE, LENGTH = 100_000, 20_000, 1024


def source(count: int) -> Path:
    """A file of `count` conversations of one to three questions, about 700 characters each, made once."""
    path = Path(tempfile.gettempdir()) / f"argonne-benchmark-conversations-{count}.jsonl"
    if not path.exists():
        # In a process of its own: what it holds is not to count as the reader's memory.
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(path, count))
        writer.start()
        writer.join()
    return path


def write(path: Path, count: int) -> None:
    texts, generator = documents(), random.Random(0)
    unfinished = path.with_suffix(".part")
    with open(unfinished, "w") as out:
        for _ in range(count):
            out.write(json.dumps({"messages": _messages(texts, generator)}) + "\n")
    unfinished.rename(path)


def _messages(texts: list[str], generator: random.Random) -> list[dict[str, str]]:
    turns = []
    for _ in range(generator.randint(1, 3)):
        for role, typical in (("user", 80), ("assistant", 200)):
            size = 8 + int(generator.lognormvariate(0, 0.7) * typical)
            text = texts[generator.randrange(len(texts))]
            begin = generator.randrange(max(1, len(text) - size))
            turns.append({"role": role, "content": text[begin : begin + size].strip() or "Yes."})
    return turns


def first(count: int) -> Path:
    """The first SAMPLE of `count` conversations in a file of their own."""
    whole = source(count)
    path = whole.with_name(f"{whole.stem}-first-{SAMPLE}.jsonl")
    if not path.exists():
        with open(whole) as lines:
            path.write_text("".join(itertools.islice(lines, SAMPLE)))
    return path


def measure(path: Path, work: Callable[[Path, Path], Any]) -> dict[str, float]:
    """Conversations a second from the file to whatever `work(file, folder)` leaves: tokens in packed rows."""
    with open(path) as lines:
        count = sum(1 for _ in lines)
    with tempfile.TemporaryDirectory() as folder, TreeMemory() as memory:
        start = time.perf_counter()
        work(path, Path(folder))
        seconds = time.perf_counter() - start
    return {"rate": count / seconds, "seconds": seconds, "peak": memory.peak_mb}


def ours(path: Path) -> dict[str, float]:
    from argonne.config import BatchSection, SourceSection
    from argonne.data.chat_data import open_conversations
    from argonne.tokens.tokenizer import load_tokenizer

    def work(path: Path, folder: Path) -> None:
        data = open_conversations(
            [SourceSection(path=str(path))],
            tokenizer=load_tokenizer(tokenizer_folder()),
            sequence_length=LENGTH,
            cache=folder,
            batch=BatchSection(tokens_per_step=LENGTH),
            seed=1,
        )
        assert data.tokens_per_epoch  # counting the rows packs them all

    return measure(path, work)


def trl(path: Path, processes: int | None) -> dict[str, float]:
    """`load_dataset` and what the constructor of SFTTrainer does with it; the model is small and ready."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from argonne.data.chat import ChatTemplate
    from argonne.tokens.tokenizer import load_tokenizer
    from benchmarks.train_step import llama

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    tokenizer.chat_template = ChatTemplate(load_tokenizer(tokenizer_folder())).jinja
    size = {"hidden": 16, "layers": 1, "heads": 1, "kv_heads": 1, "mlp": 16, "length": LENGTH}
    model = llama({**size, "vocab": len(tokenizer)})

    def work(path: Path, folder: Path) -> None:
        rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
        how = SFTConfig(
            output_dir=str(folder / "out"),
            assistant_only_loss=True,
            packing=True,
            max_length=LENGTH,
            dataset_num_proc=processes,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(model=model, args=how, train_dataset=rows, processing_class=tokenizer)
        assert len(trainer.train_dataset)

    return measure(path, work)


def benchmark(count: int) -> Benchmark:
    """With `count` conversations; the point is their number, so that a child process knows it."""
    return Benchmark(
        name="render",
        module="benchmarks.render",
        contestants={
            f"argonne, {count:,} conversations": lambda point: ours(source(int(point))),
            f"argonne, the first {SAMPLE:,}": lambda point: ours(first(int(point))),
            f"TRL SFTTrainer, the first {SAMPLE:,}": lambda point: trl(first(int(point)), None),
            "the same, a process a core": lambda point: trl(first(int(point)), len(os.sched_getaffinity(0))),
        },
        points={
            str(count): "Messages in jsonl to packed rows with the assistant's tokens marked, all cores (peak: all "
            "its processes together)"
        },
        columns=(
            Column("rate", "conversations/s"),
            Column("seconds", "seconds", ",.1f"),
            Column("peak", "peak MB"),
        ),
        relative_to=f"TRL SFTTrainer, the first {SAMPLE:,}",
        flags="" if count == CONVERSATIONS else f" --conversations {count}",
    )


BENCHMARK = benchmark(CONVERSATIONS)


def command(arguments: list[str]) -> int:
    """`--conversations N` in front of what the harness knows."""
    count = CONVERSATIONS
    if "--conversations" in arguments:
        place = arguments.index("--conversations")
        count = int(arguments[place + 1])
        arguments = arguments[:place] + arguments[place + 2 :]
    elif "--point" in arguments:
        count = int(arguments[arguments.index("--point") + 1])
    return main(benchmark(count), arguments)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
