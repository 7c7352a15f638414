"""The tasks of `eval.tasks`, measured at each checkpoint: `argonne eval` finds the same numbers there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from argonne.config import CHAT_STAGES, Recipe
from argonne.data.chat import ChatTemplate
from argonne.errors import InputError
from argonne.evaluate.requests import Task, TaskContext
from argonne.evaluate.run import measuring
from argonne.evaluate.tasks import make_tasks
from argonne.tokens.tokenizer import TextTokenizer
from argonne.train.aside import Sampled, Work
from argonne.train.data import Data


def check_tasks(recipe: Recipe) -> None:
    """Raise InputError for a task that is not there, is named twice, has no number to follow, or is given data that it
    would not read.
    """
    names = [entry.partition(":")[0] for entry in recipe.eval.tasks]
    for entry in recipe.eval.tasks:
        name, _, where = entry.partition(":")
        with _named(entry):
            (task,) = make_tasks([name])
            if task.headline is None:
                raise InputError(f"{name} has no number to follow; a chat stage asks its probes anyway, leave it out")
            if names.count(name) > 1:
                raise InputError(f"{name} is named twice; keep one")
            if where and name in ("sums", "turns"):
                raise InputError(f"{name} makes its questions itself, and {where} would not be read; leave it out")


@contextmanager
def _named(entry: str) -> Iterator[None]:
    name = entry.partition(":")[0]
    try:
        yield
    except InputError as error:
        raise InputError(f'eval.tasks, {entry!r}: {error} (data is given as "{name}:DATA")') from None


def tasks_of(recipe: Recipe, data: Data) -> dict[str, Callable[[nn.Module], Work[Sampled]]]:
    """The work of each task by its name; what it asks is written here, once. Raises InputError as `check_tasks`, and
    for a task whose data cannot be read.
    """
    check_tasks(recipe)
    found: dict[str, Callable[[nn.Module], Work[Sampled]]] = {}
    for entry in recipe.eval.tasks:
        name, _, where = entry.partition(":")
        (task,) = make_tasks([name])
        with _named(entry):
            requests = task.requests(_context(recipe, data, task, where or None))
        found[name] = partial(_measured, task, requests, data.tokenizer)
    return found


def _context(recipe: Recipe, data: Data, task: Task, where: str | None) -> TaskContext:
    length = recipe.model.max_position_embeddings or recipe.data.sequence_length
    sources = [] if recipe.stage in CHAT_STAGES else recipe.data.sources
    return TaskContext(
        data.tokenizer,
        length,
        data=where,
        own_data=sources[0].path if len(sources) == 1 else None,
        limit=recipe.eval.task_limit * (length if task.name == "bpb" else 1),
        template=data.chat if isinstance(data.chat, ChatTemplate) else None,
    )


def _measured(task: Task, requests: Sequence[Any], tokenizer: TextTokenizer, model: nn.Module) -> Work[Sampled]:
    values = yield from measuring(model, task, requests, tokenizer=tokenizer)
    values.pop("items", None)  # of thousands of questions
    assert task.headline is not None
    measure = task.headline[0]
    told = "\n".join(task.lines(values))
    metrics = {f"{task.name}/{measure}": values[measure]}
    return Sampled("task", {"task": task.name, "metrics": metrics, "values": values}, told, told)
