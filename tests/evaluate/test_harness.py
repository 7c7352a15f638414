"""The same answers as lm-evaluation-harness gives on the same model and questions, whose own task files it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argonne import cli
from argonne.errors import InputError
from argonne.evaluate.gsm8k_base import BaseProblems
from argonne.evaluate.mmlu import LETTERS, rows_of_csv
from argonne.evaluate.other_benchmarks import harness_engine
from argonne.evaluate.requests import TaskContext
from argonne.evaluate.run import evaluate
from argonne.model.build import build_model, config_from_fields
from argonne.model.load import load_model
from argonne.model.save import save_model_folder
from argonne.presets import preset
from argonne.serve.engine import Completion
from argonne.tokens.tokenizer import load_tokenizer
from tests.evaluate.conftest import Make
from tests.tokensets import words

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
SUBJECTS = ("abstract_algebra", "anatomy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A model of random weights whose context holds most questions."""
    tokenizer, out = load_tokenizer(base / "final_model"), tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 32, "head_dim": 8, "intermediate_size": 64}
    own = {**preset("nano-3.0").fields, **sizes, "max_position_embeddings": 512}
    tokenizer.save(out)
    save_model_folder(build_model(config_from_fields(own), seed=3), out, eos_id=tokenizer.eos_id)
    return out


def run_harness(model: Any, configs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What it notes of each question of each task, in their order."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as run

    tasks = {config["task"]: ConfigurableTask(config=config) for config in configs}
    for task in tasks.values():
        task.set_fewshot_seed(1234)
    found = run(lm=model, task_dict=tasks, log_samples=True, bootstrap_iters=0)["samples"]
    return {name: sorted(found[name], key=lambda sample: sample["doc_id"]) for name in tasks}


def harness_model(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=16, trust_remote_code=True)


def harness_scores(folder: Path, configs: list[dict[str, Any]]) -> list[list[float]]:
    """The log-probability of each choice of each question."""
    found = run_harness(harness_model(folder), configs)
    return [[float(answer[0]) for answer in sample["filtered_resps"]] for name in found for sample in found[name]]


def config_of(task: str, yaml_file: str, questions: dict[str, list[dict[str, Any]]], place: Path) -> dict[str, Any]:
    """The harness' own task over local files."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Functions of task files are left out: their rows are made already."""

    Loader.add_constructor("!function", lambda loader, node: None)
    files = {}
    for split, rows in questions.items():
        files[split] = str(place / f"{task}_{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = (Path(lm_eval.__file__).parent / "tasks" / yaml_file).read_text(encoding="utf-8")
    own = {name: value for name, value in yaml.load(text, Loader).items() if name not in ("tag", "process_docs")}
    return {**own, "task": task, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}


@pytest.mark.parametrize(("shots", "subjects"), [(0, SUBJECTS), (2, SUBJECTS[:1])])
def test_questions_of_mmlu_get_the_harness_answers(
    folder: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shots: int, subjects: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data, configs = shared / "data" / "eval" / "mmlu", []
    for subject in subjects:
        questions = {
            split: [
                {"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])}
                for row in rows_of_csv(data / split / f"{subject}_{split}.csv")
            ]
            for split in ("dev", "test")
        }
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        config = config_of(f"mmlu_{subject}", "mmlu/default/_default_template_yaml", questions, tmp_path)
        configs.append({**config, "description": head, "num_fewshot": shots})
    expected = harness_scores(folder, configs)
    items = evaluate(folder, ["mmlu"], data, shots, device="cpu", limit=len(expected))["tasks"]["mmlu"]["items"]
    assert len(items) == 100 + 135 * (len(subjects) > 1)
    assert {item["group"] for item in items} == set(subjects)
    same(expected, [item["scores"] for item in items])


def test_hellaswag_gets_the_harness_answers(
    folder: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = shared / "data" / "eval" / "hellaswag" / "hellaswag_val.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:60]]
    questions = {"validation": [{**row, "label": row["gold"]} for row in rows]}
    expected = harness_scores(
        folder, [{**config_of("hellaswag", "hellaswag/hellaswag.yaml", questions, tmp_path), "training_split": None}]
    )
    found = evaluate(folder, ["hellaswag"], file.parent, device="cpu", limit=60)["tasks"]["hellaswag"]
    same(expected, [item["scores"] for item in found["items"]])
    sizes = [list(map(len, row["choices"])) for row in rows]
    by_character = [int(np.argmax(np.array(one) / np.array(size))) for one, size in zip(expected, sizes, strict=True)]
    assert [item["chosen_by_character"] for item in found["items"]] == by_character


def same(expected: list[list[float]], found: list[list[float]]) -> None:
    """Equal to rounding in fp32, and the same choice wherever the two best are further apart than that."""
    theirs, ours = np.array(expected), np.array(found)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    best = np.sort(theirs, 1)
    clear = best[:, -1] - best[:, -2] > 1e-5 * np.abs(best[:, -1])
    assert clear.mean() > 0.9
    assert (ours.argmax(1) == theirs.argmax(1))[clear].all()


# ---------------------------------------------------------------------------------------------------------- gsm8k


@pytest.fixture
def word_problems(shared: Path, tmp_path: Path) -> Path:
    """60 questions, and 40 with which they may be introduced."""
    for split, count in (("test", 60), ("train", 40)):
        lines = (shared / "data/reasoning" / f"gsm8k_{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def gsm8k_config(data: Path, shots: int, tokens: int = 256) -> dict[str, Any]:
    rows = {
        split: [json.loads(line) for line in (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "test")
    }
    config = config_of("gsm8k", "gsm8k/gsm8k.yaml", rows, data)
    config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": tokens}
    return {**config, "num_fewshot": shots}


def test_a_base_model_writes_what_the_harness_reads_of_it(
    folder: Path, word_problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    samples = run_harness(harness_model(folder), [gsm8k_config(word_problems, 1, 16)])["gsm8k"]
    expected = [sample["resps"][0][0] for sample in samples if sample["filter"] == "strict-match"]
    values = evaluate(folder, ["gsm8k_base"], word_problems, 1, tokens=16, device="cpu")["tasks"]["gsm8k_base"]
    assert [item["text"] for item in values["items"]] == expected
    assert len(expected) == 60


def test_answers_are_right_where_the_harness_says_so(
    folder: Path, word_problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.model import LM

    forms = (
        "#### {}",
        "so 7.\n#### {}.",
        "It is ${} in all.",
        "{}\n\nQuestion: 4",
        "#### {}.00",
        "####{}",
        "none",
        "#### .",
    )
    rows = [json.loads(line)["answer"] for line in (word_problems / "test.jsonl").read_text().splitlines()]
    texts = [
        forms[number % len(forms)].format(answer.rpartition("#### ")[2] if number % 5 else "12")
        for number, answer in enumerate(rows)
    ]

    class Planted(LM):
        asked: list[str]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            self.asked = [request.args[0] for request in requests]
            return [text.partition("Question:")[0] for text in texts]

        loglikelihood = loglikelihood_rolling = generate_until

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = Planted()
    samples = run_harness(model, [gsm8k_config(word_problems, 3)])["gsm8k"]
    strict, last = (
        [sample["exact_match"] == 1 for sample in samples if sample["filter"] == name]
        for name in ("strict-match", "flexible-extract")
    )
    task, tokenizer = BaseProblems(), load_tokenizer(folder)
    requests = task.requests(TaskContext(tokenizer, 4096, word_problems, shots=3))
    assert [tokenizer.decode(request.ids) for request in requests] == model.asked
    values = task.measure([Completion(tokenizer.encode(text), "eos") for text in texts])
    assert [item["correct"] for item in values["items"]] == strict
    assert values["exact_match_of_last"] == pytest.approx(float(np.mean(last)))
    assert 0 < sum(strict) < sum(last) < len(texts)


# ----------------------------------------------------------------------------------------------------- all of mmlu

# Questions of the test files as published: the largest and smallest subjects, and all.
PUBLISHED = {"professional_law": 1534, "moral_scenarios": 895, "miscellaneous": 783, "abstract_algebra": 100}


@pytest.mark.campaign
def test_all_of_mmlu_is_asked_in_57_rows(folder: Path, shared: Path) -> None:
    found = evaluate(folder, ["mmlu"], shared / "data" / "eval", device="cpu")["tasks"]["mmlu"]
    sizes = {name: values["questions"] for name, values in found["groups"].items()}
    assert (found["questions"], len(sizes)) == (14_042, 57)
    assert {name: sizes[name] for name in PUBLISHED} == PUBLISHED
    assert list(sizes) == sorted(sizes)
    assert {name: part["questions"] for name, part in found["together"].items()} == {
        "stem": 3153,
        "other": 3107,
        "humanities": 4705,
        "social sciences": 3077,
    }
    assert abs(found["accuracy"] - 0.25) < 0.03
    assert found["standard_error"] == pytest.approx(0.0037, abs=2e-4)


# ------------------------------------------------------------------------------------------- whatever else it measures

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: {target}
"""
CHOICES = 'doc_to_choice: ["one", "two words"]\n'
WRITES = 'generation_kwargs: {until: ["s", "\\n"], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n'


def plain(count: int, seed: int) -> str:
    """Text without the control tokens that the harness would read as such, and we as text."""
    return words(count, seed).replace("<|im_end|>", "end")


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """Task files of the harness' three kinds of question."""
    rows = [
        {"text": plain(40 + 20 * number, number), "answer": plain(2, number), "label": number % 2}
        for number in range(6)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chosen.yaml").write_text(
        TASK.format(name="chosen", file=file, kind="multiple_choice", target="label") + CHOICES
    )
    (tmp_path / "written.yaml").write_text(
        TASK.format(name="written", file=file, kind="generate_until", target='"{{answer}}"') + WRITES
    )
    rolling = TASK.format(name="rolled", file=file, kind="loglikelihood_rolling", target='"{{text}}"')
    (tmp_path / "rolled.yaml").write_text(
        rolling.replace('doc_to_text: "{{text}}"', 'doc_to_text: ""') + "metric_list: [{metric: bits_per_byte}]\n"
    )
    return tmp_path


def test_any_task_of_the_harness_finds_the_same_through_ourharness_engine(
    make_folder: Make, task_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names, folder = ["chosen", "written", "rolled"], make_folder(64)
    expected = simple_evaluate(
        harness_model(folder), tasks=names, task_manager=TaskManager(include_path=str(task_folder)), bootstrap_iters=0
    )["results"]
    capsys.readouterr()
    asked = ["--tasks", ",".join(f"lm_eval:{name}" for name in names), "--data", str(task_folder), "--json"]
    assert cli.main(["eval", str(folder), *asked]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    for name, measure in (("chosen", "acc"), ("written", "exact_match"), ("rolled", "bits_per_byte")):
        values = found[f"lm_eval:{name}"]
        assert values["questions"] == 6
        assert values["measures"][measure]["value"] == pytest.approx(expected[name][f"{measure},none"], rel=1e-5)


def test_each_kind_of_question_is_answered_as_by_the_harness_ownharness_engine(make_folder: Make) -> None:
    from lm_eval.api.instance import Instance

    folder = make_folder(64)
    ours, theirs = harness_engine(load_model(folder), folder), harness_model(folder)
    texts = [plain(size, size) for size in (3, 30, 90)]
    questions = {
        "loglikelihood": [(text, " and then") for text in texts] + [("", texts[0]), ("ends with spaces  ", "on")],
        "loglikelihood_rolling": [(text,) for text in texts],
        "generate_until": [(text, {"until": ["e "], "max_new_tokens": 10, "do_sample": False}) for text in texts],
    }
    for kind, asked in questions.items():
        requests = [Instance(kind, {}, arguments, number) for number, arguments in enumerate(asked)]
        found, expected = getattr(ours, kind)(requests), getattr(theirs, kind)(requests)
        if kind == "generate_until":
            assert found == expected
        else:
            assert np.array(found) == pytest.approx(np.array(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"num_beams": 4}, "generation_kwargs.num_beams: is not known here"),
        ({"max_gen_toks": 64}, "max_gen_toks: found 64, expected less than the context of 64"),
    ],
)
def test_what_a_task_asks_of_an_answer_is_done_or_refused(make_folder: Make, asked: dict[str, Any], told: str) -> None:
    from lm_eval.api.instance import Instance

    folder = make_folder(64)
    engine = harness_engine(load_model(folder), folder)
    with pytest.raises(InputError, match=told):
        engine.generate_until([Instance("generate_until", {}, ("then", asked), 0)])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["lm_eval:no_such_task"], "lm-evaluation-harness has no such task"),
        (["lm_eval:chosen,mmlu"], "found mmlu beside tasks of lm_eval:"),
        (["lm_eval:chosen", "--contamination"], "--contamination: is not for tasks of lm_eval:"),
        (["lm_eval:chosen", "--nproc", "2"], "--nproc: found 2, expected 1"),
    ],
)
def test_what_the_harness_does_not_do_is_refused(
    folder: Path, more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(folder), "--tasks", *more]) == 2
    assert told in capsys.readouterr().err
