"""Generated small talk: one right answer each, and never asked about what was trained."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from argonne.evaluate.requests import TaskContext
from argonne.evaluate.turns import TURNS, Turns, turns
from argonne.serve.engine import Completion
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(train_tokenizer(["Hello Ada! "] * 30, 300, tmp_path_factory.mktemp("tokenizer") / "bpe"))


def test_what_is_asked_was_never_trained() -> None:
    trained = {turn.said for turn in islice(turns(1, unseen=False), 4000)}
    asked = {turn.said for turn in islice(turns(2, unseen=True), 400)}
    assert not trained & asked
    assert len(asked) > 100


def test_every_kind_of_turn_is_asked_and_names_nothing_that_was_not_said() -> None:
    made = list(islice(turns(3, unseen=True), 400))
    for said, _, _ in TURNS:
        assert any(turn.said.startswith(said.partition("{")[0]) for turn in made)
    for turn in made:
        assert "{" not in turn.said + turn.answer + turn.meant


def test_the_whole_answer_counts_behind_its_thought(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    task, context = Turns(), TaskContext(tokenizer, 4096, limit=4)
    right = [answer for _, answer in task.problems(context)]
    task.requests(context)
    texts = [right[0], f"<think>\na thought\n</think>\n{right[1]}", f"{right[2]} And more.", f"<think>\n{right[3]}"]
    found = task.measure([Completion(tokenizer.encode(text), "eos") for text in texts])
    assert (found["correct"], found["questions"]) == (2, 4)
