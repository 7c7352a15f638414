"""Questions of MMLU a second: `argonne eval` and lm-evaluation-harness on the same model, prompts and scores (that both
find the same is a test's to show), from the questions' files to the accuracy; the model is open already.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark, Column, main, peak_memory_mb, reset_peak_memory
from benchmarks.texts import SHARED, documents

DATA = SHARED / "data/eval/mmlu"
SUBJECTS = ("abstract_algebra", "anatomy")
LETTERS = ["A", "B", "C", "D"]
SHOTS = {"none": 0, "three": 3}
WORDS = 4096
CONTEXT, BATCH = 2048, 16


@cache
def model_folder() -> Path:
    """nano-3.0 of random weights with a tokenizer."""
    from argonne.model.build import build_model, config_from_fields
    from argonne.model.save import save_model_folder
    from argonne.presets import preset
    from argonne.tokens.tokenizer import load_tokenizer, train_tokenizer

    folder = Path(tempfile.mkdtemp(prefix="argonne-benchmark-questions-"))
    tokenizer = load_tokenizer(train_tokenizer(documents(), WORDS, folder / "tokenizer"))
    sizes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": CONTEXT}
    tokenizer.save(folder)
    save_model_folder(
        build_model(config_from_fields({**preset("nano-3.0").fields, **sizes}), seed=0), folder, eos_id=tokenizer.eos_id
    )
    return folder


@cache
def two_subjects() -> Path:
    """A folder with the files of two subjects."""
    folder = Path(tempfile.mkdtemp(prefix="argonne-benchmark-mmlu-"))
    for split in ("test", "dev"):
        (folder / split).mkdir()
        for subject in SUBJECTS:
            (folder / split / f"{subject}_{split}.csv").write_bytes(
                (DATA / split / f"{subject}_{split}.csv").read_bytes()
            )
    return folder


def ours(point: str) -> dict[str, float]:
    from argonne.evaluate.run import evaluate
    from argonne.model.load import load_model

    loaded, data = load_model(model_folder()), two_subjects()
    reset_peak_memory()
    start = time.perf_counter()
    found = evaluate(loaded.folder, ["mmlu"], data, SHOTS[point], device="cpu", loaded=loaded)["tasks"]["mmlu"]
    return {"rate": found["questions"] / (time.perf_counter() - start), "peak": peak_memory_mb()}


def harness(point: str) -> dict[str, float]:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    folder = str(model_folder())
    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=BATCH, trust_remote_code=True)
    tasks = {subject: ConfigurableTask(config=config_of(subject, SHOTS[point])) for subject in SUBJECTS}
    reset_peak_memory()
    start = time.perf_counter()
    found = evaluate(lm=model, task_dict=tasks, bootstrap_iters=0, limit=None)
    questions = sum(counts["effective"] for counts in found["n-samples"].values())
    return {"rate": questions / (time.perf_counter() - start), "peak": peak_memory_mb()}


def config_of(subject: str, shots: int) -> dict[str, Any]:
    """The harness' MMLU over local files."""
    import json

    files = {}
    for split in ("test", "dev"):
        with open(DATA / split / f"{subject}_{split}.csv", encoding="utf-8", newline="") as stream:
            rows = [
                {"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])} for row in csv.reader(stream)
            ]
        files[split] = str(two_subjects() / f"{subject}_{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    about = subject.replace("_", " ")
    choices = "".join(f"{letter}. {{{{choices[{number}]}}}}\n" for number, letter in enumerate(LETTERS))
    return {
        "task": subject,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
        "output_type": "multiple_choice",
        "description": f"The following are multiple choice questions (with answers) about {about}.\n\n",
        "doc_to_text": "{{question.strip()}}\n" + choices + "Answer:",
        "doc_to_choice": LETTERS,
        "doc_to_target": "answer",
    }


HARNESS = "lm-evaluation-harness"
BENCHMARK = Benchmark(
    name="questions",
    module="benchmarks.questions",
    contestants={"argonne": ours, HARNESS: harness},
    points={
        name: f"235 questions of MMLU with {shots} examples, nano-3.0 with a vocabulary of {WORDS:,}, fp32; "
        f"the harness in batches of {BATCH}"
        for name, shots in SHOTS.items()
    },
    columns=(Column("rate", "questions/s", ".1f"), Column("peak", "peak memory, MB")),
    relative_to=HARNESS,
    needs=DATA,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
