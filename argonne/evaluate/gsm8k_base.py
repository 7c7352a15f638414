"""GSM8K as a base model is asked, behind worked examples: prompts, the texts that end an answer and how it is read are
those of lm-evaluation-harness' `gsm8k`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from argonne.errors import InputError
from argonne.evaluate.choices import error_of
from argonne.evaluate.gsm8k import FILES, Answer, WordProblems, rows_of_problems
from argonne.evaluate.own_files import data_of, file_of
from argonne.evaluate.requests import AnswerRequest, TaskContext
from argonne.layout import TURN_TOKENS
from argonne.serve.engine import Completion
from argonne.serve.options import SamplingOptions

TRAINING_FILES = ("train.jsonl", "gsm8k_train.jsonl")
SHOTS, MOST_SHOTS = 5, 8
SEED = 1234  # of the choice of examples, anew for each question
STOPS = ("Question:", "</s>", TURN_TOKENS[1])
TOKENS = 256  # of an answer
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
MARKED = re.compile(r"#### (\-?[0-9\.\,]+)")
ANY_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


class BaseProblems(WordProblems):
    """Exact match of the number behind ####, and of whichever number comes last. --shots: examples, 0 to 8, of the
    training file beside the test file (default: 5).
    """

    name = "gsm8k_base"
    too_long = "are longer than the context: their beginnings are cut off"

    def problems(self, context: TaskContext) -> Sequence[tuple[str, Answer]]:
        rows = rows_of_problems(file_of("gsm8k", FILES, context))
        return [(question, bare(answer)) for question, answer in rows]

    def asked(self, context: TaskContext, questions: Sequence[str]) -> Iterator[AnswerRequest]:
        shots, tokens = SHOTS if context.shots is None else context.shots, context.tokens or TOKENS
        if not 0 <= shots <= MOST_SHOTS:
            raise InputError(f"--shots: found {shots}, expected 0 to {MOST_SHOTS} for {self.name}")
        room, tokenizer = context.context_length - tokens, context.tokenizer
        if room < 1:
            raise InputError(
                f"--tokens: found {tokens}, expected less than the model's context of {context.context_length:,}"
            )
        self._decode = tokenizer.decode
        examples = examples_for(shots, data_of("gsm8k", context)) if shots else []
        for ids in tokenizer.encode_batch(list(prompts(questions, examples, shots))):
            self._trimmed += len(ids) > room
            yield AnswerRequest(
                np.array(ids[-room:]),
                SamplingOptions(tokens, temperature=0.0, top_p=1.0),
                tokenizer.stop_ids,
                STOPS,
            )

    def words(self, completion: Completion) -> str:
        text = self._decode(completion.ids, skip_special_tokens=True)
        return min((text.partition(stop)[0] for stop in STOPS), key=len)

    def given(self, text: str) -> Answer | None:
        found = MARKED.search(text)
        return bare(found[1]) if found else None

    def details(self, texts: Sequence[str], right: Sequence[Answer]) -> dict[str, Any]:
        """The same of whichever number comes last."""
        numbers = [[*map(bare, ANY_NUMBER.findall(text)), None][-2:][0] for text in texts]
        correct = [number == one for number, one in zip(numbers, right, strict=True)]
        return {"exact_match_of_last": float(np.mean(correct)), "standard_error_of_last": error_of(correct)}

    def lines(self, values: dict[str, Any]) -> list[str]:
        last = f"    by its last number {values['exact_match_of_last']:.4f}"
        error = values["standard_error_of_last"]
        return [*super().lines(values), last if error is None else f"{last}, standard error {error:.4f}"]


def examples_for(shots: int, data: Path) -> list[tuple[str, str]]:
    """The rows of the training file beside the test file. Raises InputError where there are too few."""
    folder = data if data.is_dir() else data.parent
    file = next((folder / name for name in TRAINING_FILES if (folder / name).is_file()), None)
    if file is None:
        raise InputError(
            f"--shots: found {shots}, but there is no {' or '.join(TRAINING_FILES)} in {folder} to take examples from; "
            "put it there, or ask with --shots 0"
        )
    examples = list(rows_of_problems(file))
    if len(examples) < shots:
        raise InputError(f"--shots: found {shots}, but {file} holds {len(examples)} examples; ask for fewer")
    return examples


def prompts(questions: Sequence[str], examples: Sequence[tuple[str, str]], shots: int) -> Iterator[str]:
    """Each question behind `shots` examples, (question, worked answer), that are drawn for it."""
    draw = Random(SEED)
    for question in questions:
        chosen = [examples[one] for one in draw.sample(range(len(examples)), shots)]
        before = (f"Question: {text}\nAnswer: {answer}\n\n" for text, answer in chosen)
        yield f"{''.join(before)}Question: {question}\nAnswer:"


def bare(text: str) -> str:
    """A number, or the one behind the #### of a worked answer, as it is compared."""
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()
