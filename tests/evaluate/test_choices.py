"""Questions with given answers: prompts and scores of lm-evaluation-harness, planted models, killed and resumed."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from argonne import cli
from argonne.cli.measure import GIVEN_ANSWERS, HARNESS, OWN_TASKS
from argonne.evaluate.benchmarks import BENCHMARKS
from argonne.evaluate.choices import MultipleChoice
from argonne.evaluate.mmlu import LETTERS, Mmlu
from argonne.evaluate.other_benchmarks import PREFIX
from argonne.evaluate.requests import Score, ScoreRequest, TaskContext
from argonne.evaluate.run import evaluate
from argonne.evaluate.scorer import scoring
from argonne.evaluate.tasks import tasks
from argonne.model.load import load_model
from argonne.serve.engine import to_the_end
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from tests.evaluate.conftest import QUESTIONS, Make


def context_of(folder: Path, data: Path, **more: Any) -> TaskContext:
    return TaskContext(load_tokenizer(folder), 1024, data, **more)


class Planted:
    """Scores by a rule of prompt and answer."""

    def __init__(self, tokenizer: TextTokenizer, rule: Callable[[str], float]) -> None:
        self.tokenizer, self.rule = tokenizer, rule

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        texts = [self.tokenizer.decode(request.ids.tolist()) for request in requests]
        return [Score(np.array([self.rule(text)]), np.array([True])) for text in texts]


def test_the_prompt_is_the_published_one_with_examples_before_it(folder: Path, mmlu: Path) -> None:
    (first, *_), (shot, *_) = (list(Mmlu().questions(context_of(folder, mmlu, shots=n))) for n in (None, 1))
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    asked = "Which of these is the largest?\nA. a cat\nB. a whale\nC. a mouse\nD. an ant\nAnswer:"
    assert first.pairs[1] == (head + asked, " B")
    assert shot.pairs[1] == (f"{head}{asked} B\n\n{asked}", " B")


def test_a_model_that_knows_the_answers_by_text_gets_them_all_however_they_are_shuffled(
    folder: Path, tmp_path: Path
) -> None:
    draw, known = np.random.default_rng(0), {row[0].strip(): row[1:5][LETTERS.index(row[5])] for row in QUESTIONS}
    (tmp_path / "test").mkdir()
    rows = []
    for question in QUESTIONS * 20:
        order = draw.permutation(4)
        right = LETTERS[int(np.flatnonzero(order == LETTERS.index(question[5]))[0])]
        rows.append([question[0], *(question[1 + one] for one in order), right])
    with open(tmp_path / "test" / "x_test.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)

    def knows(text: str) -> float:
        lines = text.split("\n\n")[1].splitlines()
        return float(lines[-1][-1] == next(line[0] for line in lines[1:5] if line[3:] == known[lines[0]]))

    task = Mmlu()
    planted = Planted(load_tokenizer(folder), knows)
    assert task.measure(planted(task.requests(context_of(folder, tmp_path))))["accuracy"] == 1.0
    task = Mmlu()
    says_c = Planted(load_tokenizer(folder), lambda text: float(text.endswith(" C")))
    found = task.measure(says_c(task.requests(context_of(folder, tmp_path))))
    assert found["correct"] == sum(row[5] == "C" for row in rows)
    share = found["accuracy"]
    assert found["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / 59))


def test_groups_are_counted_each_and_together(folder: Path, mmlu: Path) -> None:
    found = evaluate(folder, ["mmlu"], mmlu.parent, device="cpu")["tasks"]["mmlu"]
    assert {name: part["questions"] for name, part in found["groups"].items()} == {"anatomy": 3, "marketing": 3}
    assert {name: part["questions"] for name, part in found["together"].items()} == {"stem": 3, "other": 3}
    assert found["correct"] == sum(part["correct"] for part in found["groups"].values())
    text = "\n".join(Mmlu().lines(found))
    assert "marketing" in text
    assert f"({found['correct']} of 6)" in text


ROWS: dict[str, tuple[dict[str, Any], int, tuple[str, str]]] = {
    "hellaswag": (
        {
            "activity_label": "Roof",
            "ctx_a": "A man [header] sits.",
            "ctx_b": "he",
            "endings": ["is using wrap [title] now.", "left.", "sat.", "ran."],
            "label": "3",
        },
        3,
        ("Roof: A man sits. He", " is using wrap.  now."),
    ),
    "arc_easy": (
        {
            "question": {"stem": "Which?", "choices": [{"text": "sun", "label": "1"}, {"text": "sea", "label": "2"}]},
            "answerKey": "2",
        },
        1,
        ("Question: Which?\nAnswer:", " sun"),
    ),
    "piqa": ({"goal": "Open it.", "sol1": "Pull.", "sol2": "Push."}, 1, ("Question: Open it.\nAnswer:", " Pull.")),
    "winogrande": (
        {"sentence": "Ann saw Eva because _ was tall.", "option1": "Ann", "option2": "Eva", "answer": "2"},
        1,
        ("Ann saw Eva because Ann", " was tall."),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_a_benchmarks_own_file_is_asked_as_published(folder: Path, tmp_path: Path, name: str) -> None:
    row, right, first = ROWS[name]
    task: MultipleChoice = BENCHMARKS[name]()
    (tmp_path / task.files[0]).write_text(json.dumps(row) + "\n")  # type: ignore[attr-defined]
    (tmp_path / "valid-labels.lst").write_text("1\n")
    (question,) = task.questions(context_of(folder, tmp_path))
    assert question.right == right
    if name == "hellaswag":
        assert question.pairs[0][0] == first[0]
    else:
        assert question.pairs[0] == first


def test_answers_of_one_token_share_a_pass_and_are_those_of_passes_of_their_own(folder: Path, mmlu: Path) -> None:
    model = load_model(folder, dtype=torch.float64).model
    requests = Mmlu().requests(context_of(folder, mmlu))
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, given, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    found = to_the_end(scoring(model, requests))
    assert sum(rows for rows, _ in shapes) == 6
    assert len(found) == len(requests)
    for number, score in found.items():
        request = requests[number]
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(request.ids[None, :-1]), use_cache=False).logits[0]
        expected = torch.log_softmax(logits, -1)[request.start - 1 :].gather(
            1, torch.from_numpy(request.ids[request.start :, None].astype("int64"))
        )
        assert score.log_probabilities == pytest.approx(expected[:, 0].numpy(), abs=1e-12)


def test_the_size_of_a_batch_changes_no_choice_in_float64(folder: Path, shared: Path) -> None:
    model = load_model(folder, dtype=torch.float64).model
    chosen = []
    for tokens in (1, 16 * 1024):
        task = BENCHMARKS["hellaswag"]()
        requests = task.requests(context_of(folder, shared / "data" / "eval", limit=20))
        found = to_the_end(scoring(model, requests, tokens_a_batch=tokens))
        values = task.measure([found[number] for number in range(len(requests))])
        chosen.append([(item["chosen"], item["chosen_by_character"]) for item in values["items"]])
    assert chosen[0] == chosen[1]


def test_the_size_of_a_batch_changes_only_choices_that_are_counted_as_close_in_fp32(folder: Path, shared: Path) -> None:
    model, items = load_model(folder).model, []
    for tokens in (1, 16 * 1024):
        task = Mmlu()
        requests = task.requests(context_of(folder, shared / "data" / "eval", limit=200))
        found = to_the_end(scoring(model, requests, tokens_a_batch=tokens))
        values = task.measure([found[number] for number in range(len(requests))])
        assert values["close"] == sum(item["close"] for item in values["items"])
        items.append(values["items"])
    differing = [one for one, other in zip(*items, strict=True) if one["chosen"] != other["chosen"]]
    assert all(item["close"] for item in differing)


def test_prompts_beyond_the_context_lose_their_beginning_and_are_counted(make_folder: Make, mmlu: Path) -> None:
    found = evaluate(make_folder(64), ["mmlu"], mmlu, 2, device="cpu")["tasks"]["mmlu"]
    assert found["trimmed"] == 6
    assert "6 questions are longer than the context" in "\n".join(Mmlu().lines(found))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tasks", "mmlu"], "no data given"),
        (["--tasks", "mmlu", "--data", "NOWHERE"], "no such file or folder"),
        (["--tasks", "mmlu", "--data", "."], "no test/*_test.csv"),
        (["--tasks", "piqa", "--data", "."], "no valid.jsonl"),
        (["--tasks", "mmmlu", "--data", "."], "did you mean 'mmlu'"),
        (["--tasks", "mmlu", "--data", "MMLU", "--shots", "6"], "expected 0 to 5"),
        (["--tasks", "hellaswag", "--shots", "2"], "--shots: is for --tasks mmlu"),
        (["--tasks", "gsm8k_base", "--data", "PROBLEMS", "--shots", "7"], "holds 6 examples; ask for fewer"),
        (["--tasks", "gsm8k_base", "--data", "PROBLEMS", "--shots", "9"], "expected 0 to 8"),
        (["--tasks", "gsm8k_base", "--data", "ALONE"], "there is no train.jsonl or gsm8k_train.jsonl in"),
        (["--tasks", "gsm8k", "--data", "PROBLEMS", "--shots", "1"], "--shots: is for"),
        (["--tasks", "mmlu", "--data", "MMLU", "--nproc", "0"], "expected at least 1"),
    ],
)
def test_wrong_input_is_told_in_a_line(
    folder: Path,
    mmlu: Path,
    word_problems: Path,
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone = shutil.copy(word_problems / "test.jsonl", mmlu.parent / "alone.jsonl")
    places = {"MMLU": str(mmlu), "PROBLEMS": str(word_problems), "ALONE": str(alone)}
    assert cli.main(["eval", str(folder), *(places.get(one, one) for one in arguments)]) == 2
    assert told in capsys.readouterr().err


def test_models_that_are_none_are_told_in_a_line(
    folder: Path, mmlu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said_of(model: Path) -> str:
        assert cli.main(["eval", str(model), "--tasks", "mmlu", "--data", str(mmlu)]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        return said

    larger, cut, other = (shutil.copytree(folder, tmp_path / name) for name in ("larger", "cut", "other"))
    for file in train_tokenizer([Path(__file__).read_text()], 420, tmp_path / "tokenizer").iterdir():
        shutil.copy(file, larger)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (other / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    assert "it is another model's tokenizer" in said_of(larger)
    assert "truncated or damaged" in said_of(cut)
    assert "a model of another family: model_type is 'llama'" in said_of(other)


def test_the_command_line_knows_every_benchmark() -> None:
    assert [*tasks()] == [*OWN_TASKS, *GIVEN_ANSWERS]
    assert HARNESS == PREFIX


def test_lambada_scores_the_last_word(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lambada_test.jsonl").write_text(json.dumps({"text": "the cat sees the hen"}) + "\n")
    found = evaluate(folder, ["lambada"], tmp_path, device="cpu")["tasks"]["lambada"]
    assert found["questions"] == 1
    assert found["perplexity"] == pytest.approx(math.exp(-found["items"][0]["log_probability"]))
