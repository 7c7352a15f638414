"""A measurement on disk: answers as they come, so that a killed one goes on where it stood; then its items and
numbers.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np

from argonne import layout
from argonne.errors import InputError
from argonne.evaluate.requests import AnswerRequest, Score, ScoreRequest
from argonne.files import fingerprint, quick_hash, write_json, write_text
from argonne.model.stored import hashes_of_weights
from argonne.serve.engine import Completion

TABLE = "results.csv"
Found = TypeVar("Found", Score, Completion)


class Kept(Generic[Found]):
    """The answers of one task in a folder, for one model and these requests, by number: a file for each process that
    asks (`rank`), all of which are read. Raises InputError for files of others.
    """

    def __init__(
        self, folder: Path, task: str, model: str, requests: Sequence[ScoreRequest | AnswerRequest], rank: int = 0
    ) -> None:
        self._folder, self._task, self._rank = folder, task, rank
        self.known: dict[int, Found] = {}
        self._size = len(requests)
        digest = quick_hash()
        for request in requests:
            others = {name: value for name, value in vars(request).items() if name != "ids"}
            digest.update(f"{others} {len(request.ids)}".encode() + np.asarray(request.ids, np.int64).tobytes())
        self._head = json.dumps({"model": model, "requests": digest.hexdigest()})
        folder.mkdir(parents=True, exist_ok=True)
        self.read()
        whole = _whole_lines(self.file)
        write_text(self.file, "".join(f"{line}\n" for line in whole) or f"{self._head}\n")

    @property
    def file(self) -> Path:
        return self._folder / f"{self._task}.answers{f'.{self._rank}' if self._rank else ''}.jsonl"

    def read(self) -> None:
        """Take in what all processes have written."""
        for file in self._folder.glob(f"{self._task}.answers*.jsonl"):
            whole = _whole_lines(file)
            if whole and whole[0] != self._head:
                raise InputError(f"{file}: holds the answers of another model or other questions; give another --out")
            for row in map(json.loads, whole[1:]):
                self.known[row["request"]] = cast(Found, _answer_of(row))

    def written(self) -> tuple[int, int]:
        """Answers that all processes have written, and how many there are to be."""
        files = self._folder.glob(f"{self._task}.answers*.jsonl")
        return sum(max(0, file.read_bytes().count(b"\n") - 1) for file in files), self._size

    def add(self, found: Mapping[int, Found]) -> None:
        """Further answers, on the disk on return."""
        with open(self.file, "a", encoding="utf-8") as stream:
            for number, answer in found.items():
                stream.write(json.dumps({"request": number, **_row_of(answer)}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _whole_lines(file: Path) -> list[str]:
    """What follows the last line feed was cut off by a kill."""
    return file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []


def _row_of(answer: Score | Completion) -> dict[str, Any]:
    if isinstance(answer, Completion):
        return {"ids": answer.ids, "stop": answer.stop}
    return {"scores": answer.log_probabilities.tolist(), "greedy": answer.greedy.tolist()}


def _answer_of(row: Mapping[str, Any]) -> Score | Completion:
    if "ids" in row:
        return Completion(row["ids"], row["stop"])
    return Score(np.array(row["scores"], np.float64), np.array(row["greedy"], bool))


def model_of(folder: Path, int8: bool) -> str:
    """What tells one model's answers from another's: weights, configuration, and whether the weights were rounded."""
    config = folder / layout.MODEL_CONFIG
    return fingerprint([hashes_of_weights(folder), config.read_text() if config.is_file() else "", int8])[:24]


def write_results(out: Path, results: Mapping[str, Any]) -> None:
    """`results.json`, its numbers as rows of `results.csv`, and the items of each task that has them as one object a
    line in `TASK.jsonl`.
    """
    tasks = {}
    for name, values in results["tasks"].items():
        items = values.get("items")
        if items is not None:
            write_text(out / f"{name}.jsonl", "".join(f"{json.dumps(item)}\n" for item in items))
        tasks[name] = {key: value for key, value in values.items() if key != "items"}
    write_json(out / layout.RESULTS, {**results, "tasks": tasks})
    write_text(out / TABLE, _table({**results, "tasks": tasks}))


def _table(results: Mapping[str, Any]) -> str:
    """A row for each number of a task, of each of its groups and of those together."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["model", "task", "group", "measure", "value"])
    for task, values in results["tasks"].items():
        groups = {"": values, **values.get("groups", {}), **values.get("together", {})}
        for group, numbers in groups.items():
            for measure, value in numbers.items():
                if isinstance(value, int | float):
                    rows.writerow([results["model"], task, group, measure, value])
    return text.getvalue()
