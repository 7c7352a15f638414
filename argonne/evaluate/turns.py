"""Generated small talk: turns that take up what was said to them, with one right answer each.

As with the sums, training and evaluation never meet: what is named in a turn decides by a hash on which side it falls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from argonne.evaluate.gsm8k import WordProblems
from argonne.evaluate.probes import trace_of
from argonne.evaluate.requests import TaskContext
from argonne.evaluate.sums import is_unseen

QUESTIONS = 200
DRAWS = 20  # for each question that is asked: some come twice
_NAMES = """
Ada Alan Amir Anna Ben Carla Chen Clara David Elena Emma Eric Fatima Felix Grace Hana Hugo Ida Ivan Jack Julia Karl Lara
Leo Lucy Maria Mark Mei Nina Noah Olga Omar Paul Rosa Ruth Sara Simon Tina Vera Yusuf
"""
_THINGS = """
apple ball bell boat book box cake car chair clock coat cup dog door drum fish flag fork hat horse key lamp leaf map
moon pen ring ship shoe star table tree wheel window
"""
NAMES, THINGS = _NAMES.split(), _THINGS.split()
COLOURS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow")
# What a user says, what is answered, and what is meant by it: the thought of a model that thinks first.
TURNS = (
    ("Hello, my name is {name}.", "Hello {name}! How can I help you?", "a greeting from {name}"),
    ("Hi, I am {name}.", "Hello {name}! How can I help you?", "a greeting from {name}"),
    ("Good morning! {name} here.", "Good morning, {name}!", "a good morning from {name}"),
    ("Say good night to {name}.", "Good night, {name}!", "good night to {name}"),
    ("Thank you for the {thing}! Yours, {name}.", "You are welcome, {name}!", "thanks from {name}"),
    ("{name} likes the {thing}. What does {name} like?", "{name} likes the {thing}.", "{name} likes the {thing}"),
    ("I have a {colour} {thing}. What colour is it?", "Your {thing} is {colour}.", "the {thing} is {colour}"),
    ("Say {colour} {thing} twice.", "{colour} {thing}, {colour} {thing}", "twice {colour} {thing}"),
)


@dataclass(frozen=True)
class Turn:
    said: str
    answer: str
    meant: str


def turns(seed: int, *, unseen: bool) -> Iterator[Turn]:
    """Endless turns, of those kept for evaluation or of the others."""
    draw = Random(seed)
    while True:
        kind = draw.randrange(len(TURNS))
        chosen = {"name": draw.choice(NAMES), "thing": draw.choice(THINGS), "colour": draw.choice(COLOURS)}
        said, answer, meant = TURNS[kind]
        named = [value for slot, value in chosen.items() if f"{{{slot}}}" in said]
        if is_unseen(kind, *named) == unseen:
            yield Turn(said.format(**chosen), answer.format(**chosen), meant.format(**chosen))


class Turns(WordProblems):
    """The whole answer, behind its trace where it has one, on `--limit` (200) unseen turns, or all that there are."""

    name = "turns"

    def problems(self, context: TaskContext) -> list[tuple[str, str]]:
        count = context.limit or QUESTIONS
        made = {one.said: one.answer for one in islice(turns(0, unseen=True), DRAWS * count)}
        return list(made.items())[:count]

    def given(self, text: str) -> str | None:
        _, kind, words = trace_of(text)
        return None if kind == "open" else words.strip()
