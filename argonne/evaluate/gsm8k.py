"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): word problems asked as a user would, the last number of the answer
compared with the right one.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

import numpy as np

from argonne.data.chat import ChatTemplate, template_of
from argonne.errors import InputError
from argonne.evaluate.probes import questions_of, read_lines, trace_of
from argonne.evaluate.requests import AnswerRequest, Headline, TaskContext
from argonne.serve.engine import Completion
from argonne.serve.options import SamplingOptions

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
TOKENS = 512  # of an answer
NAMES = ("test.jsonl", "gsm8k_test.jsonl")  # in a folder
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

    def __init__(self) -> None:
        self._template: ChatTemplate | None = None
        self._right: list[Answer] = []
        self._questions: list[str] = []
        self._samples = self._trimmed = 0

    def problems(self, context: TaskContext) -> Sequence[tuple[str, Answer]]:
        """(question, right answer) of each."""
        if context.data is None:
            raise InputError(f"task {self.name}: no data given; name its test file or the folder of it with --data")
        return list(_read(Path(context.data)))

    def given(self, text: str) -> Answer | None:
        """What an answer's text gives as the answer."""
        return answer_of(text)

    def details(self, texts: Sequence[str]) -> dict[str, Any]:
        """What else can be told of the greedy answers."""
        return {}

    def requests(self, context: TaskContext) -> list[AnswerRequest]:
        if context.shots is not None:
            raise InputError(f"--shots: found {context.shots}, but {self.name} is asked as a user would; leave it out")
        template, tokens = context.template or template_of(context.tokenizer), context.tokens or TOKENS
        self._template, self._samples = template, context.samples
        asked = self.problems(context)[: context.limit]
        if not asked:
            raise InputError(f"task {self.name}: no question to ask; raise --limit, or give other data")
        requests: list[AnswerRequest] = []
        for (text, right), question in zip(asked, questions_of(template, [text for text, _ in asked]), strict=True):
            room = min(tokens, context.context_length - len(question.prompt))
            if room < 1:
                self._trimmed += 1
                continue
            self._questions.append(text)
            self._right.append(right)
            ids = np.array(question.prompt)
            requests.append(AnswerRequest(ids, SamplingOptions(room, temperature=0.0, top_p=1.0), template.stop_ids))
            requests += [
                AnswerRequest(
                    ids, SamplingOptions(room, temperature=0.8, top_p=0.95, seed=number * len(asked)), template.stop_ids
                )
                for number in range(1, self._samples + 1)
            ]
        if not requests:
            raise InputError(
                f"task {self.name}: none of {len(asked):,} questions fits into the context of "
                f"{context.context_length:,} tokens"
            )
        return requests

    def measure(self, found: Sequence[Completion]) -> dict[str, Any]:
        assert self._template is not None
        size = self._samples + 1
        texts = [self._template.words(completion.ids) for completion in found]
        greedy = [self.given(text) == right for text, right in zip(texts[::size], self._right, strict=True)]
        values: dict[str, Any] = {
            "exact_match": float(np.mean(greedy)),
            "standard_error": _error(greedy),
            "correct": sum(greedy),
            "questions": len(greedy),
            "too_long": self._trimmed,
            "stopped": float(np.mean([completion.stop == "eos" for completion in found[::size]])),
            **self.details(texts[::size]),
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
                "majority_standard_error": _error(most),
                **self.details([text for at, text in enumerate(texts) if at % size]),
            }
        shown = zip(self._questions, texts[::size], self._right, greedy, strict=True)
        values["answers"] = [
            {"question": question, "answer": text, "right": str(right), "correct": bool(correct)}
            for question, text, right, correct in list(shown)[:SHOWN]
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
            lines.append(f"    {values['too_long']:,} questions do not fit into the context and were left out")
        if "sampled" in values:
            part = values["sampled"]
            lines.append(
                f"    {part['samples']} samples: mean {of(part, 'exact_match', 'standard_error')}; majority "
                f"{of(part, 'majority', 'majority_standard_error')}"
            )
        return lines


def _error(correct: Sequence[bool]) -> float | None:
    """Of a share of n: sqrt(p (1 - p) / (n - 1)); None for a single one."""
    n, p = len(correct), float(np.mean(correct))
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def _majority(answers: Sequence[Answer | None]) -> Answer | None:
    """The answer that is given most often, the first of several; answers without one do not vote."""
    counted = Counter(answer for answer in answers if answer is not None)
    return counted.most_common(1)[0][0] if counted else None


def _read(path: Path) -> Iterator[tuple[str, Decimal]]:
    file = next((path / name for name in NAMES if (path / name).is_file()), path)
    if not file.is_file():
        raise InputError(
            f"--data {path}: no file; give GSM8K's test file (jsonl), or a folder with {' or '.join(NAMES)}"
        )
    for number, line in enumerate(read_lines(file, "give GSM8K's test file"), 1):
        try:
            row = json.loads(line)
            question, right = row["question"], last_number(row["answer"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file}:{number}: expected an object with question and answer") from None
        if right is None:
            raise InputError(f"{file}:{number}: its answer holds no number")
        yield str(question), right
