"""Benchmarks of given answers besides MMLU, from their own files."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from argonne.evaluate.choices import MultipleChoice, Question, asked
from argonne.evaluate.own_files import file_of, rows_of
from argonne.evaluate.probes import read_lines
from argonne.evaluate.requests import TaskContext


class FromLines(MultipleChoice):
    """One object a line of a file."""

    files: tuple[str, ...]
    needed: str  # what a row holds, for a message

    def questions(self, context: TaskContext) -> Iterator[Question]:
        file = file_of(self.name, self.files, context)
        rights = self.rights(file)

        def made(number: int, row: dict[str, Any]) -> Question:
            return self.question(row if rights is None else {**row, "label": rights[number]})

        return rows_of(self.name, file, self.needed, made)

    def rights(self, file: Path) -> Sequence[str] | None:
        """The right answers, where they lie in a file of their own."""
        return None

    @abstractmethod
    def question(self, row: dict[str, Any]) -> Question: ...


class HellaSwag(FromLines):
    """Zellers et al. 2019, arXiv 1905.07830."""

    name = "hellaswag"
    files = ("hellaswag_val.jsonl",)
    needed = "activity_label, ctx_a, ctx_b, endings and label, or query, choices and gold"

    def question(self, row: dict[str, Any]) -> Question:
        if "query" in row:
            return asked(row["query"], row["choices"], int(row["gold"]))
        query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return asked(_cleaned(query), [_cleaned(ending) for ending in row["endings"]], int(row["label"]))


def _cleaned(text: str) -> str:
    """Without the marks that WikiHow left."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


class Arc(FromLines):
    """Clark et al. 2018, arXiv 1803.05457."""

    needed = "question (stem and choices) and answerKey"

    def question(self, row: dict[str, Any]) -> Question:
        choices = row["question"]["choices"]
        right = [choice["label"] for choice in choices].index(row["answerKey"])
        texts = [choice["text"] for choice in choices]
        stem = row["question"]["stem"]
        return asked(f"Question: {stem}\nAnswer:", texts, right, (stem, *texts))


class ArcEasy(Arc):
    name = "arc_easy"
    files = ("ARC-Easy-Test.jsonl",)


class ArcChallenge(Arc):
    name = "arc_challenge"
    files = ("ARC-Challenge-Test.jsonl",)


class Piqa(FromLines):
    """Bisk et al. 2020, arXiv 1911.11641."""

    name = "piqa"
    files = ("valid.jsonl",)
    needed = "goal, sol1 and sol2, and a file of labels beside it (valid-labels.lst)"

    def rights(self, file: Path) -> Sequence[str] | None:
        return read_lines(file.with_name(f"{file.stem}-labels.lst"), "piqa's labels lie beside its questions")

    def question(self, row: dict[str, Any]) -> Question:
        goal, *both = row["goal"], row["sol1"], row["sol2"]
        return asked(f"Question: {goal}\nAnswer:", both, int(row["label"]), (goal, *both))


class WinoGrande(FromLines):
    """Sakaguchi et al. 2019, arXiv 1907.10641: what follows the blank is scored behind either word in it."""

    name = "winogrande"
    files = ("dev.jsonl",)
    needed = "sentence (with _), option1, option2 and answer"
    normalised = False

    def question(self, row: dict[str, Any]) -> Question:
        before, after = row["sentence"].split("_", 1)
        prompts = [before + row["option1"], before + row["option2"]]
        rest = f" {after.strip()}"
        pairs, right = tuple((prompt, rest) for prompt in prompts), int(row["answer"]) - 1
        return Question(pairs, right, (len(rest),) * 2, texts=("".join(pairs[right]),))


BENCHMARKS: dict[str, Callable[[], MultipleChoice]] = {
    kind.name: kind for kind in (HellaSwag, ArcEasy, ArcChallenge, Piqa, WinoGrande)
}
