"""Probes: the same questions at every stage, the answers side by side, and what can be measured of an answer without
knowing the right one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np

from argonne.data.chat import THINK, THINK_END, ChatTemplate, Conversation, Message, template_of
from argonne.errors import InputError
from argonne.evaluate.requests import AnswerRequest, Headline, TaskContext
from argonne.serve.engine import Completion
from argonne.serve.options import SamplingOptions

QUESTIONS = (
    "Hello! How are you?",
    "How do I pack light for a week of travel?",
    "Explain to a ten-year-old what a black hole is.",
    "I failed an important exam. What should I do now?",
    "What can I do at home on a rainy day?",
    "Write a short poem about the ocean.",
    "What is the difference between machine learning and deep learning?",
    "How do I cook garlic noodles?",
)
TOKENS = 200  # of an answer, as the family's own probes
MODES = {"greedy": (0.0, 1.0), "sampled": (0.8, 0.95)}  # temperature, top_p
GRAM = 4
LETTERS = 20  # fewer tell no language
STOPS = {"eos": "turn end", "length": "length", "context": "context"}


@dataclass(frozen=True)
class Question:
    """A question as a person reads it, and the ids up to where its answer begins."""

    text: str
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """One answer and its measures.

    stop: "turn end", "length" or "context". repetition: share of the answer's runs of four tokens that it had before
    (seq-rep-4 of Welleck et al. 2020, arXiv 1908.04319), None where it has no run. language: ISO 639-1 of the words,
    None where they are too few; same_language: that it is the question's. trace: "closed", "open" or "empty"; None
    without `<think>`. trace_tokens: of what stands between the tags.
    """

    question: str
    answer: str
    tokens: int
    stop: str
    repetition: float | None
    language: str | None
    same_language: bool | None
    trace: str | None
    trace_tokens: int | None


def questions_of(template: ChatTemplate, texts: Sequence[str]) -> list[Question]:
    """Each text as a user would ask it."""
    prompts = [template.prompt(Conversation((Message("user", text),))).tolist() for text in texts]
    return [Question(text, tuple(prompt)) for text, prompt in zip(texts, prompts, strict=True)]


def look_at(question: str, found: Completion, template: ChatTemplate) -> Probe:
    """An answer with its measures."""
    answer = template.words(found.ids)
    trace, kind, words = trace_of(answer)
    runs = [tuple(found.ids[start : start + GRAM]) for start in range(len(found.ids) - GRAM + 1)]
    spoken, asked = language_of(words), language_of(question)
    return Probe(
        question=question,
        answer=answer,
        tokens=len(found.ids),
        stop=STOPS[found.stop],
        repetition=1 - len(set(runs)) / len(runs) if runs else None,
        language=spoken,
        same_language=spoken == asked if spoken and asked else None,
        trace=kind,
        trace_tokens=None if trace is None else len(template.tokenizer.encode(trace)),
    )


def trace_of(answer: str) -> tuple[str | None, str | None, str]:
    """(what was thought, closed or open or empty, the words after it) of an answer."""
    before, opened, rest = answer.partition(THINK)
    if not opened:
        return None, None, answer
    thought, closed, words = rest.partition(THINK_END)
    if not closed:
        return thought, "open", before
    return thought, "closed" if thought.strip() else "empty", words


def language_of(text: str) -> str | None:
    """ISO 639-1 of the language that a text is most likely in."""
    import py3langid  # a second to load

    if sum(character.isalpha() for character in text) < LETTERS:
        return None
    language, _ = py3langid.classify(text)
    return str(language)


def summary(probes: Sequence[Probe]) -> dict[str, Any]:
    """The measures over all answers; a share is None where nothing could be counted."""

    def mean(values: Sequence[float | bool | None]) -> float | None:
        counted = [float(value) for value in values if value is not None]
        return fmean(counted) if counted else None

    return {
        "answers": len(probes),
        "stopped": mean([probe.stop == "turn end" for probe in probes]),
        "length": mean([probe.tokens for probe in probes]),
        "repetition": mean([probe.repetition for probe in probes]),
        "same_language": mean([probe.same_language for probe in probes]),
        "languages_told": sum(probe.same_language is not None for probe in probes),
        "traces": sum(probe.trace is not None for probe in probes),
        "closed": mean([probe.trace == "closed" for probe in probes]),
        "trace_length": mean([probe.trace_tokens for probe in probes]),
    }


def in_words(values: dict[str, Any]) -> str:
    """A summary on one line."""

    def share(name: str) -> str:
        return "n/a" if values[name] is None else f"{values[name]:.0%}"

    counted = f" (of {values['languages_told']} that tell one)" if values["languages_told"] else ""
    told = (
        f"{values['answers']} answers, {share('stopped')} end their turn, {values['length']:.0f} tokens each, "
        f"{share('repetition')} repeated, {share('same_language')} in the question's language"
        f"{counted}"
    )
    if values["traces"]:
        told += f"; {share('closed')} think and close it, {values['trace_length']:.0f} tokens of thought"
    return told


class Probes:
    """The eight questions of the family, or those of `--data` (one a line), greedy and sampled."""

    name = "probes"
    asks: Literal["answers"] = "answers"
    headline: Headline = None

    def __init__(self) -> None:
        self._template: ChatTemplate | None = None
        self._questions: list[Question] = []
        self._tokens = TOKENS

    def requests(self, context: TaskContext) -> list[AnswerRequest]:
        if context.shots is not None:
            raise InputError(f"--shots: found {context.shots}, but probes are asked without examples; leave it out")
        self._template = template = context.template or template_of(context.tokenizer)
        texts: Sequence[str] = QUESTIONS
        if context.data is not None:
            lines = read_lines(Path(context.data), "give probes a text file with one question a line")
            texts = [line.strip() for line in lines if line.strip()]
        self._questions = questions_of(template, texts)
        longest = max(self._questions, key=lambda question: len(question.prompt))
        room = context.context_length - len(longest.prompt)
        if room < 1:
            raise InputError(
                f"task probes: {longest.text[:60]!r} takes {len(longest.prompt):,} tokens, and the model's context has "
                f"{context.context_length:,}; shorten it, or leave it out"
            )
        self._tokens = min(context.tokens or TOKENS, room)
        return [
            AnswerRequest(
                np.array(question.prompt),
                SamplingOptions(self._tokens, temperature=temperature, top_p=top_p),
                template.stop_ids,
            )
            for temperature, top_p in MODES.values()
            for question in self._questions
        ]

    def measure(self, found: Sequence[Completion]) -> dict[str, Any]:
        assert self._template is not None
        size = len(self._questions)
        values: dict[str, Any] = {"template": self._template.template, "max_new_tokens": self._tokens}
        for number, mode in enumerate(MODES):
            part = found[number * size : (number + 1) * size]
            probes = [
                look_at(question.text, answer, self._template)
                for question, answer in zip(self._questions, part, strict=True)
            ]
            values[mode] = {**summary(probes), "probes": [dataclasses.asdict(probe) for probe in probes]}
        return values

    def lines(self, values: dict[str, Any]) -> list[str]:
        return [f"probes, {mode}: {in_words(values[mode])}" for mode in MODES]


def read_lines(file: Path, advice: str) -> list[str]:
    """The lines of a text file. Raises InputError where it cannot be read, or says nothing."""
    try:
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")  # nothing else ends a line of JSON
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--data {file}: {error}; {advice}") from None
    if not any(map(str.strip, lines)):
        raise InputError(f"--data {file}: no question in it; {advice}")
    return lines


def side_by_side(columns: dict[str, Sequence[dict[str, Any]]]) -> str:
    """Answers of several models or modes to the same questions, as text. columns: name -> the same number of probes."""
    parts = []
    for probes in zip(*columns.values(), strict=True):
        parts.append(f"? {probes[0]['question']}")
        for name, probe in zip(columns, probes, strict=True):
            repeated = "" if probe["repetition"] is None else f", {probe['repetition']:.0%} repeated"
            parts.append(f"  {name} ({probe['tokens']} tokens, {probe['stop']}{repeated}):")
            parts += [f"    {line}" for line in probe["answer"].splitlines() or [""]]
        parts.append("")
    return "\n".join(parts)
