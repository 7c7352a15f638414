"""Word problems: the number that an answer gives, exact match, samples and majority, generated sums."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.cli import main
from argonne.errors import InputError
from argonne.evaluate.gsm8k import WordProblems, answer_of, last_number
from argonne.evaluate.requests import TaskContext
from argonne.evaluate.sums import Problem, Sums, is_unseen, problems
from argonne.serve.engine import Completion
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

ROWS = [
    {"question": "Two and two?", "answer": "2+2=4\n#### 4"},
    {"question": "A thousand more?", "answer": "So\n#### 1,004"},
    {"question": "Half of it?", "answer": "#### 0.5"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    texts = ["The answer is 1004. How many are there? "] * 30
    return load_tokenizer(train_tokenizer(texts, 330, tmp_path_factory.mktemp("tokenizer") / "bpe"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def measured(task: Any, tokenizer: TextTokenizer, answers: list[str], **how: Any) -> dict[str, Any]:
    task.requests(TaskContext(tokenizer, 4096, **how))
    return dict(task.measure([Completion(tokenizer.encode(text), "eos") for text in answers]))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 72.", "72"),
        ("It costs $1,234.50", "1234.50"),
        ("<think>\n3+4=7\n</think>\n\nIt is -8", "-8"),
        ("12 apples, then 7", "7"),
        ("<think>\n12 and on", None),
        ("none", None),
        ("#### 1,004", "1004"),
    ],
)
def test_the_number_of_an_answer_is_its_last_one_behind_a_closed_trace(text: str, number: str | None) -> None:
    assert answer_of(text) == (None if number is None else Decimal(number))


def test_exact_match_is_the_share_of_right_numbers(tokenizer: TextTokenizer, file: Path) -> None:
    found = measured(WordProblems(), tokenizer, ["It is 4.", "1004.0", "nothing"], data=file)
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert (found["correct"], found["questions"]) == (2, 3)
    assert found["standard_error"] == pytest.approx(math.sqrt(2 / 9 / 2))


def test_samples_are_told_by_their_mean_and_by_their_majority(tokenizer: TextTokenizer, file: Path) -> None:
    answers = [*("4", "4", "4", "5"), *("0", "7", "1004", "none"), *("1", "2", "2", "0.5")]
    found = measured(WordProblems(), tokenizer, answers, data=file, samples=3)
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["sampled"]["exact_match"] == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3)
    assert found["sampled"]["majority"] == pytest.approx(1 / 3)  # 4; then 7, said first; then 2


def test_questions_beyond_the_context_are_counted(tokenizer: TextTokenizer, file: Path) -> None:
    task = WordProblems()
    longest = len(task.requests(TaskContext(tokenizer, 4096, data=file))[1].ids)
    other = WordProblems()
    assert len(other.requests(TaskContext(tokenizer, longest, data=file))) == 2
    found = other.measure([Completion([], "length")] * 2)
    assert (found["questions"], found["too_long"]) == (2, 1)


@pytest.mark.parametrize(
    ("line", "told"), [("{broken", "test.jsonl:1"), ('{"question": "a"}', "test.jsonl:1"), ("", "no question")]
)
def test_a_file_that_holds_no_questions_is_told(tokenizer: TextTokenizer, tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "test.jsonl").write_text(line)
    with pytest.raises(InputError, match=told):
        WordProblems().requests(TaskContext(tokenizer, 4096, data=tmp_path))


def test_every_question_of_gsm8k_has_a_right_number(tokenizer: TextTokenizer, shared: Path) -> None:
    asked = WordProblems().problems(TaskContext(tokenizer, 4096, data=shared / "data/reasoning/gsm8k_test.jsonl"))
    assert len(asked) == 1319
    assert asked[0][1] == 18


@given(st.integers(10, 999), st.integers(10, 999), st.sampled_from([1, -1]))
def test_worked_steps_give_the_result_digit_by_digit(a: int, b: int, sign: int) -> None:
    if sign < 0:
        a, b = max(a, b), min(a, b)
    problem = Problem("sum", "", a, b, sign)
    *lines, last = problem.steps.splitlines()[1:]
    assert last == f"= {problem.result}"
    digits = "".join(line.split()[1].rpartition("=")[2][-1] for line in reversed(lines))
    assert int(digits) == problem.result
    assert lines[0].split()[0] == "ones"


def test_training_and_evaluation_never_meet() -> None:
    made = {unseen: [one for one, _ in zip(problems(1, unseen=unseen), range(400), strict=False)] for unseen in (0, 1)}
    for unseen, listed in made.items():
        assert all(is_unseen(one.left, one.right) == bool(unseen) for one in listed)
    kinds = [one.kind for one in made[0]]
    assert {kind: round(kinds.count(kind) / 400, 1) for kind in ("sum", "difference")} == {
        "sum": 0.5,
        "difference": 0.3,
    }


def test_generated_sums_are_the_same_each_time_and_right_answers_score(tokenizer: TextTokenizer) -> None:
    context = TaskContext(tokenizer, 4096, limit=40)
    asked = Sums().problems(context)
    assert asked == Sums().problems(context)
    assert len(asked) == 40
    found = measured(Sums(), tokenizer, [f"<think>\n{right}\n</think>\n{right}" for _, right in asked], limit=40)
    assert found["exact_match"] == 1.0


def test_a_flag_of_other_tasks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tasks, flag, value in (("sums", "--data", "x"), ("probes", "--limit", "3"), ("bpb,probes", "--data", "x")):
        assert main(["eval", str(tmp_path), "--tasks", tasks, flag, value]) == 2
        assert flag in capsys.readouterr().err
    for flag, value in (("--samples", "3"), ("--tokens", "9"), ("--before", str(tmp_path))):
        assert main(["eval", str(tmp_path), "--tasks", "bpb", flag, value]) == 2
        assert flag in capsys.readouterr().err


def test_numbers_are_read_whole() -> None:
    assert last_number("1,234,567 and -0.25") == Decimal("-0.25")


def test_a_trace_counts_as_closed_and_as_leading_to_the_answer(tokenizer: TextTokenizer) -> None:
    texts = (
        "<think>\n= 5\n</think>\nThe answer is 5.",
        "<think>\n= 5\n</think>\n6",
        "<think>\n</think>\n5",
        "<think>\n= 5",
        "5",
    )
    found = measured(Sums(), tokenizer, list(texts), limit=5)
    assert (found["closed"], found["consistent"], found["sentences"]) == (0.4, 0.2, 0.2)
    assert "40.0% think and close it" in "\n".join(Sums().lines(found))


def test_sampled_answers_are_looked_at_apart_from_the_greedy_ones(tokenizer: TextTokenizer) -> None:
    texts = ["5", "The answer is 5.", "7", "<think>\n7\n</think>\nThe answer is 7."]
    found = measured(Sums(), tokenizer, texts, limit=2, samples=1)
    assert (found["sentences"], found["sampled"]["sentences"], found["sampled"]["closed"]) == (0.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("data", "told"), [((), "no data given"), (("--data", "missing.jsonl"), "missing.jsonl: no such file")]
)
def test_a_test_file_that_is_not_there_ends_with_2(
    data: tuple[str, ...], told: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(base), "--tasks", "gsm8k", *data]) == 2
    assert told in capsys.readouterr().err
