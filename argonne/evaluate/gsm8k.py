"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): word problems asked as a user would, the last number of the answer
compared with the right one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

import numpy as np

from argonne.data.chat import ChatTemplate, template_of
from argonne.errors import InputError
from argonne.evaluate.choices import error_of
from argonne.evaluate.own_files import file_of, rows_of
from argonne.evaluate.probes import questions_of, trace_of
from argonne.evaluate.requests import AnswerRequest, Headline, TaskContext
from argonne.serve.engine import Completion
from argonne.serve.options import SamplingOptions

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
TOKENS = 512  # of an answer
FILES = ("test.jsonl", "gsm8k_test.jsonl")
SHOWN = 5  # answers that the results keep
Answer = Decimal | str


def last_number(text: str) -> Decimal | None:
    """The last number of a text, without thousands' commas and currency."""
    found = NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None
    except InvalidOperation:
        return None


def answer_of(text: str) -> Decimal | None:
    """The last number of an answer, behind its trace where it has one; None of a trace that was never closed."""
    _, kind, words = trace_of(text)
    return None if kind == "open" else last_number(words)


class WordProblems:
    """Exact match, greedy and, with `--samples K`, of K sampled answers: their mean, and of the number that most of
    them give. Questions of `--data`, rows of `question` and `answer`, whose last number is right.
    """

    name = "gsm8k"
    asks: Literal["answers"] = "answers"
    headline: Headline = ("exact_match", "higher")
    too_long = "do not fit into the context and were left out"

    def __init__(self) -> None:
        self._template: ChatTemplate | None = None
        self._right: list[Answer] = []
        self._questions: list[str] = []
        self._samples = self._trimmed = 0

    @property
    def size(self) -> int:
        """Questions that were asked."""
        return len(self._right)

    def texts(self) -> list[tuple[str, ...]]:
        return [(question,) for question in self._questions]

    def problems(self, context: TaskContext) -> Sequence[tuple[str, Answer]]:
        """(question, right answer) of each."""
        file = file_of(self.name, FILES, context)
        found = [(question, last_number(answer)) for question, answer in rows_of_problems(file)]
        problems = [(question, right) for question, right in found if right is not None]
        if len(problems) < len(found):
            number = 1 + [right for _, right in found].index(None)
            raise InputError(f"{file}:{number}: its answer holds no number")
        return problems

    def asked(self, context: TaskContext, questions: Sequence[str]) -> Iterator[AnswerRequest | None]:
        """The greedy request of each question; None of one that does not fit into the context."""
        if context.shots is not None:
            raise InputError(f"--shots: found {context.shots}, but {self.name} is asked as a user would; leave it out")
        self._template = template = context.template or template_of(context.tokenizer)
        for question in questions_of(template, questions):
            room = min(context.tokens or TOKENS, context.context_length - len(question.prompt))
            if room < 1:
                self._trimmed += 1
                yield None
                continue
            options = SamplingOptions(room, temperature=0.0, top_p=1.0)
            yield AnswerRequest(np.array(question.prompt), options, template.stop_ids)

    def words(self, completion: Completion) -> str:
        assert self._template is not None
        return self._template.words(completion.ids)

    def given(self, text: str) -> Answer | None:
        """What an answer's text gives as the answer."""
        return answer_of(text)

    def details(self, texts: Sequence[str], right: Sequence[Answer]) -> dict[str, Any]:
        """What else can be told of answers."""
        return {}

    def requests(self, context: TaskContext) -> list[AnswerRequest]:
        self._samples, asked = context.samples, self.problems(context)[: context.limit]
        if not asked:
            raise InputError(f"task {self.name}: no question to ask; raise --limit, or give other data")
        requests: list[AnswerRequest] = []
        for (text, right), request in zip(asked, self.asked(context, [text for text, _ in asked]), strict=True):
            if request is None:
                continue
            self._questions.append(text)
            self._right.append(right)
            requests.append(request)
            for number in range(1, self._samples + 1):
                how = replace(request.options, temperature=0.8, top_p=0.95, seed=number * len(asked))
                requests.append(replace(request, options=how))
        if not requests:
            raise InputError(
                f"task {self.name}: none of {len(asked):,} questions fits into the context of "
                f"{context.context_length:,} tokens"
            )
        return requests

    def measure(self, found: Sequence[Completion]) -> dict[str, Any]:
        size = self._samples + 1
        texts = list(map(self.words, found))
        greedy = [self.given(text) == right for text, right in zip(texts[::size], self._right, strict=True)]
        values: dict[str, Any] = {
            "exact_match": float(np.mean(greedy)),
            "standard_error": error_of(greedy),
            "correct": sum(greedy),
            "questions": len(greedy),
            "too_long": self._trimmed,
            "stopped": float(np.mean([completion.stop in ("eos", "stop") for completion in found[::size]])),
            **self.details(texts[::size], self._right),
        }
        if self._samples:
            answers = [[self.given(text) for text in texts[at + 1 : at + size]] for at in range(0, len(texts), size)]
            pairs = list(zip(answers, self._right, strict=True))
            most = [_majority(given) == right for given, right in pairs]
            each = [float(np.mean([one == right for one in given])) for given, right in pairs]
            values["sampled"] = {
                "samples": self._samples,
                "exact_match": float(np.mean(each)),
                "standard_error": float(np.std(each, ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None,
                "majority": float(np.mean(most)),
                "majority_standard_error": error_of(most),
                **self.details(
                    [text for at, text in enumerate(texts) if at % size],
                    [right for right in self._right for _ in range(self._samples)],
                ),
            }
        shown = zip(self._questions, texts[::size], self._right, greedy, strict=True)
        values["answers"] = [
            {"question": question, "answer": text, "right": str(right), "correct": bool(correct)}
            for question, text, right, correct in list(shown)[:SHOWN]
        ]
        values["items"] = [
            {"prompt": question, "asked": question, "text": text, "answer": str(self.given(text))}
            | {"correct": bool(correct)}
            for question, text, correct in zip(self._questions, texts[::size], greedy, strict=True)
        ]
        return values

    def lines(self, values: dict[str, Any]) -> list[str]:
        def of(part: dict[str, Any], name: str, error: str) -> str:
            spread = "" if part[error] is None else f", standard error {part[error]:.4f}"
            return f"{part[name]:.4f}{spread}"

        lines = [
            f"{self.name}: exact match {of(values, 'exact_match', 'standard_error')} ({values['correct']:,} of "
            f"{values['questions']:,}), greedy; {values['stopped']:.0%} end their turn"
        ]
        if values["too_long"]:
            lines.append(f"    {values['too_long']:,} questions {self.too_long}")
        if "sampled" in values:
            part = values["sampled"]
            lines.append(
                f"    {part['samples']} samples: mean {of(part, 'exact_match', 'standard_error')}; majority "
                f"{of(part, 'majority', 'majority_standard_error')}"
            )
        return lines


def _majority(answers: Sequence[Answer | None]) -> Answer | None:
    """The answer that is given most often, the first of several; answers without one do not vote."""
    counted = Counter(answer for answer in answers if answer is not None)
    return counted.most_common(1)[0][0] if counted else None


def rows_of_problems(file: Path) -> Iterator[tuple[str, str]]:
    """(question, worked answer) of each row."""

    def made(number: int, row: dict[str, object]) -> tuple[str, str]:
        return str(row["question"]), str(row["answer"])

    return rows_of("gsm8k", file, "question and answer", made)
