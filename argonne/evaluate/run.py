"""`argonne eval`: open the model, let each task ask, score, measure."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from argonne import layout
from argonne.config import CHAT_STAGES
from argonne.errors import InputError
from argonne.evaluate import baselines
from argonne.evaluate.answers import answering
from argonne.evaluate.requests import Task, TaskContext
from argonne.evaluate.scorer import scoring
from argonne.evaluate.tasks import make_tasks
from argonne.evaluate.texts import byte_count, open_texts
from argonne.serve.engine import to_the_end
from argonne.serve.quantize import quantize
from argonne.tokens.formats import open_tokens
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from argonne.model.load import LoadedModel

BASELINE_TOKENS = 50_000_000


def evaluate(
    model_path: str | Path,
    tasks: Sequence[str],
    data: str | Path | None = None,
    shots: int | None = None,
    *,
    limit: int | None = None,
    tokens: int | None = None,
    samples: int = 0,
    device: str = "auto",
    loaded: LoadedModel | None = None,
    int8: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a model. The answer can be written as JSON: {"model", "parameters", "tasks": {name: numbers, counts,
    standard errors}}.

    `data`: a token set (its held-out part), text files, or the questions of a task; unset, the held-out part of what a
    run trained on. `limit`: tokens of text, or questions, at most. `tokens`: of an answer at most. `samples`: of each
    question, beside the greedy answer. `loaded`: the model, where it is open already. int8: its weights are rounded
    (argonne.serve.quantize). `progress` is called with (requests done, requests in all). Raises InputError for anything
    that cannot be measured.
    """
    from argonne.model.load import load_model
    from argonne.parallel.mesh import choose_device

    chosen = make_tasks(tasks)
    loaded = loaded or load_model(model_path, device=choose_device(device))
    if loaded.tokenizer_folder is None:
        raise InputError(f"{loaded.folder}: no tokenizer in it; copy the tokenizer's files there")
    tokenizer = load_tokenizer(loaded.tokenizer_folder)
    context = TaskContext(
        tokenizer,
        int(loaded.model.config.max_position_embeddings),
        data,
        _own_data(Path(model_path)) if data is None and "bpb" in tasks else None,
        shots,
        limit,
        tokens,
        samples,
    )
    parameters = loaded.model.num_parameters()
    if int8:
        quantize(loaded.model)
    results = {
        task.name: to_the_end(measuring(loaded.model, task, task.requests(context), progress)) for task in chosen
    }
    return {"model": str(model_path), "folder": str(loaded.folder), "parameters": parameters, "tasks": results}


def measuring(
    model: Any, task: Task, requests: Sequence[Any], progress: Callable[[int, int], None] | None = None
) -> Generator[None, None, dict[str, Any]]:
    """What a task finds of the answers to its requests, as work that yields between forward passes."""
    if task.asks == "scores":
        return task.measure((yield from scoring(model, requests, progress=progress)))
    return task.measure((yield from answering(model, requests, progress=progress)))


def _own_data(run: Path) -> str | None:
    """The one token set that a run was trained on, from its saved configuration; None where it has none.

    Raises InputError where there are several: which one is the question to answer.
    """
    config = run / layout.CONFIG
    tree = tomllib.loads(config.read_text()) if config.is_file() else {}
    if tree.get("stage") in CHAT_STAGES:
        return None
    sources: list[str] = [source["path"] for source in tree.get("data", {}).get("sources", [])]
    if len(sources) > 1:
        raise InputError(f"{run}: trained on {len(sources)} token sets ({', '.join(sources)}); choose one with --data")
    return sources[0] if sources else None


def baseline_results(data: str | Path, tokenizer: TextTokenizer, *, limit: int | None = None) -> dict[str, Any]:
    """Bits per byte of uniform, unigram, bigram and xz on the held-out documents of a token set, the same that task bpb
    reads.

    They are fitted on the set's training tokens, at most the first 50 million. Raises InputError where nothing is held
    out.
    """
    held_out = open_texts(data, tokenizer, limit)
    tokens = open_tokens(data)
    if tokens.eos_id is None:
        raise InputError(f"{data}: names no EOS, and the bigram model starts each document with it")
    train = np.empty(min(tokens.train.tokens, BASELINE_TOKENS), dtype=np.int64)
    tokens.train.copy(0, train)
    size, vocabulary = sum(held_out.bytes), tokenizer.vocab_size
    text = _text(tokenizer, np.concatenate(held_out.documents))
    return {
        "uniform": baselines.uniform_bits(held_out.tokens, vocabulary) / size,
        "unigram": baselines.unigram_bits(train, held_out.documents, vocabulary) / size,
        "bigram": baselines.bigram_bits(train, held_out.documents, vocabulary, tokens.eos_id) / size,
        "xz": baselines.xz_bits(text) / size,
        "xz_after_training_text": baselines.xz_bits(text, _text(tokenizer, train)) / size,
        "bytes": size,
        "training_tokens": len(train),
        "training_bytes": byte_count(tokenizer, train),
    }


def _text(tokenizer: TextTokenizer, ids: np.ndarray) -> bytes:
    """The text of a stream of documents, a line feed for every EOS."""
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.eos_id))
    return "\n".join(tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces).encode()


def render(results: dict[str, Any]) -> str:
    """The results for a person, a line a task."""
    lines = [f"{results['model']}: {results['parameters']:,} parameters"]
    for task in make_tasks(list(results["tasks"])):
        lines += task.lines(results["tasks"][task.name])
    return "\n".join(lines)
