"""`argonne eval`: open the model, let each task ask, score, measure."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from argonne import layout
from argonne.config import CHAT_STAGES
from argonne.errors import InputError
from argonne.evaluate import baselines
from argonne.evaluate.answers import answering
from argonne.evaluate.contamination import contamination_of
from argonne.evaluate.contamination import lines as told
from argonne.evaluate.kept import Kept, model_of, write_results
from argonne.evaluate.ranks import share_out
from argonne.evaluate.requests import Task, TaskContext
from argonne.evaluate.scorer import scoring
from argonne.evaluate.tasks import make_tasks
from argonne.evaluate.texts import byte_count, open_texts
from argonne.model.stored import fingerprint_of_weights
from argonne.parallel.neighbours import beside_others
from argonne.serve.engine import to_the_end, tokenizer_of
from argonne.serve.quantize import quantize
from argonne.tokens.formats import open_tokens
from argonne.tokens.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from argonne.model.load import LoadedModel

BASELINE_TOKENS = 50_000_000


@dataclass(frozen=True)
class Asked:
    """What is measured, in words that another process can be told. See `evaluate`."""

    model: str
    tasks: tuple[str, ...]
    data: str | None = None
    shots: int | None = None
    limit: int | None = None
    tokens: int | None = None
    samples: int = 0
    device: str = "auto"
    int8: bool = False

    def context(self, loaded: LoadedModel) -> TaskContext:
        """What tasks may look at. Raises InputError where the model's tokenizer does not fit."""
        return TaskContext(
            tokenizer_of(loaded, Path(self.model)),
            int(loaded.model.config.max_position_embeddings),
            self.data,
            _own_data(Path(self.model)) if self.data is None and "bpb" in self.tasks else None,
            self.shots,
            self.limit,
            self.tokens,
            self.samples,
        )


@beside_others()
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
    nproc: int = 1,
    out: Path | None = None,
    contamination: Callable[[int, int], None] | None = None,
    begins: Callable[[Task], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a model. The answer can be written as JSON: {"model", "folder", "parameters", "int8", "tasks": {name:
    numbers, counts, standard errors}}.

    `data`: a token set (its held-out part), text files, or the questions of a task; unset, the held-out part of
    what a run trained on. `limit`: tokens of text, or questions, at most. `tokens`: of an answer at most.
    `samples`: of each question, beside the greedy answer. `loaded`: the model, where it is open already. int8: its
    weights are rounded (argonne.serve.quantize). `nproc`: processes that share the questions, on a card each where
    there are cards. `out`: a folder that keeps answers as they come, from which a killed measurement goes on, and
    the results (argonne.evaluate.kept). `contamination`: look for the items in what the model was trained on
    (argonne.evaluate.contamination), and call this with (bytes read, bytes in all). `begins` gets each task once
    its requests are made. `progress` is called with (requests done, requests in all). Raises InputError for
    anything that cannot be measured.
    """
    from argonne.model.load import load_model
    from argonne.parallel.mesh import choose_device

    chosen, where = make_tasks(tasks), choose_device(device)
    names, where_from = tuple(task.name for task in chosen), None if data is None else str(data)
    asked = Asked(str(model_path), names, where_from, shots, limit, tokens, samples, device, int8)
    loaded = loaded or load_model(model_path, device="meta" if nproc > 1 else where)
    context, parameters = asked.context(loaded), loaded.model.num_parameters()
    if int8 and nproc == 1:
        quantize(loaded.model)
    requests = {task.name: list[Any](task.requests(context)) for task in chosen}
    if begins is not None:
        list(map(begins, chosen))
    with _kept(asked, loaded.folder, requests, out, nproc, progress) as kept:
        results = {
            task.name: to_the_end(
                measuring(loaded.model, task, requests[task.name], progress, kept.get(task.name), context.tokenizer)
            )
            for task in chosen
        }
    if contamination is not None:
        for name, part in contamination_of(model_path, chosen, results, contamination).items():
            results[name]["contamination"] = part
    found = {"model": str(model_path), "folder": str(loaded.folder), "parameters": parameters, "int8": int8}
    found["tasks"] = results
    if out is not None:
        how = {"shots": shots, "limit": limit, "weights": fingerprint_of_weights(loaded.folder)}
        write_results(out, how | found)
    return found


@contextmanager
def _kept(
    asked: Asked,
    model_folder: Path,
    requests: Mapping[str, Sequence[Any]],
    out: Path | None,
    nproc: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[dict[str, Kept[Any]]]:
    """Where the answers of each task are kept while the block runs, nowhere where nobody asks for it; those of several
    processes are there already.
    """
    with TemporaryDirectory(prefix="argonne-eval-") if nproc > 1 and out is None else nullcontext(out) as folder:
        if folder is None:
            yield {}
            return
        told = model_of(model_folder, asked.int8)
        kept = {name: Kept[Any](Path(folder), name, told, some) for name, some in requests.items()}
        if nproc > 1:
            share_out(_share, (asked, Path(folder), told, nproc), nproc, list(kept.values()), progress)
        yield kept


def _share(asked: Asked, folder: Path, told: str, nproc: int) -> None:
    """One process' answers, into the folder."""
    from argonne.model.load import load_model
    from argonne.parallel.mesh import choose_device

    rank = int(os.environ["RANK"])
    loaded = load_model(asked.model, device=choose_device(asked.device, rank))
    context = asked.context(loaded)
    if asked.int8:
        quantize(loaded.model)
    for task in make_tasks(asked.tasks):
        requests: list[Any] = list(task.requests(context))
        kept = Kept[Any](folder, task.name, told, requests, rank)
        to_the_end(_answers(loaded.model, task, requests, None, kept, context.tokenizer, (rank, nproc)))


def _answers(
    model: Any,
    task: Task,
    requests: Sequence[Any],
    progress: Callable[[int, int], None] | None,
    kept: Kept[Any] | None,
    tokenizer: TextTokenizer | None,
    share: tuple[int, int] = (0, 1),
) -> Generator[None, None, dict[int, Any]]:
    known, keep = (None, None) if kept is None else (kept.known, kept.add)
    if task.asks == "scores":
        return (yield from scoring(model, requests, share=share, progress=progress, known=known, keep=keep))
    return (
        yield from answering(
            model, requests, tokenizer=tokenizer, share=share, progress=progress, known=known, keep=keep
        )
    )


def measuring(
    model: Any,
    task: Task,
    requests: Sequence[Any],
    progress: Callable[[int, int], None] | None = None,
    kept: Kept[Any] | None = None,
    tokenizer: TextTokenizer | None = None,
) -> Generator[None, None, dict[str, Any]]:
    """What a task finds of the answers to its requests, as work that yields between forward passes."""
    found = yield from _answers(model, task, requests, progress, kept, tokenizer)
    return task.measure([found[number] for number in range(len(requests))])


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
    tokenizer.ending_as(tokens.eos_id)
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
        values = results["tasks"][task.name]
        lines += [*task.lines(values), *(told(values["contamination"]) if "contamination" in values else ())]
    return "\n".join(lines)
