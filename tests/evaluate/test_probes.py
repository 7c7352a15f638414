"""Probes: what is measured of an answer, how a model is asked, what comes out side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from argonne.cli import main
from argonne.data.chat import ChatTemplate, Conversation, Message, template_of
from argonne.errors import InputError
from argonne.evaluate.answers import answering
from argonne.evaluate.own_files import rows_of
from argonne.evaluate.probes import QUESTIONS, look_at, questions_of, read_lines, side_by_side, summary
from argonne.evaluate.requests import AnswerRequest
from argonne.evaluate.run import evaluate, render
from argonne.layout import CHAT_TEMPLATE
from argonne.model.build import build_model, config_from_fields
from argonne.model.save import save_model_folder
from argonne.presets import preset
from argonne.serve.engine import Completion, complete_ids, to_the_end
from argonne.serve.options import SamplingOptions
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

TEXTS = ["Long long time ago there was a model that answered every question. ", "Ein Mädchen sah 你好.\n"] * 30
ASKED = "What can a person do on a rainy afternoon?"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(train_tokenizer(TEXTS, 330, tmp_path_factory.mktemp("tokenizer") / "bpe"))


@pytest.fixture(scope="module")
def template(tokenizer: TextTokenizer) -> ChatTemplate:
    return ChatTemplate(tokenizer)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, template: ChatTemplate) -> Path:
    """An untrained chat model."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), template.tokenizer
    sizes = {"vocab_size": 330, "hidden_size": 32, "head_dim": 8, "intermediate_size": 64}
    model = build_model(config_from_fields({**preset("nano-3.0").fields, **sizes}), seed=3)
    tokenizer.save(folder)
    save_model_folder(model, folder, eos_id=list(template.stop_ids), bos_id=None, pad_id=tokenizer.pad_id)
    (folder / CHAT_TEMPLATE).write_text(template.jinja)
    return folder


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    from argonne.model.load import load_model

    return load_model(model_folder).model


def looked_at(template: ChatTemplate, text: str, stop: str = "eos") -> Any:
    return look_at(ASKED, Completion(template.tokenizer.encode(text), stop), template)


@pytest.mark.parametrize(
    ("text", "trace", "thought"),
    [
        ("Read a book.", None, None),
        ("<think>\nbooks\n</think>\n\nRead a book.", "closed", "\nbooks\n"),
        ("<think>\nbooks and", "open", "\nbooks and"),
        ("<think>\n\n</think>\n\nRead a book.", "empty", "\n\n"),
    ],
)
def test_a_trace_is_closed_open_or_empty(
    template: ChatTemplate, text: str, trace: str | None, thought: str | None
) -> None:
    probe = looked_at(template, text)
    assert probe.trace == trace
    assert probe.trace_tokens == (None if thought is None else len(template.tokenizer.encode(thought)))
    assert probe.answer == text


def test_repetition_is_the_share_of_runs_of_four_tokens_seen_before(template: ChatTemplate) -> None:
    def of(ids: list[int]) -> float | None:
        return look_at(ASKED, Completion(ids, "length"), template).repetition

    assert of(list(range(40, 60))) == 0
    assert of([40] * 13) == pytest.approx(0.9)  # ten runs, one of them distinct
    assert of([40, 41, 42]) is None


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("You can read a book, bake a cake or call an old friend.", True),
        ("Sie können ein Buch lesen, einen Kuchen backen oder Freunde anrufen.", False),
        ("<think>\nDas Mädchen liest ein Buch\n</think>\n\nYou can read a good book or bake a cake.", True),
        ("42", None),
    ],
)
def test_the_language_of_the_words_is_set_beside_the_questions(
    template: ChatTemplate, text: str, same: bool | None
) -> None:
    assert looked_at(template, text).same_language is same


def test_a_summary_counts_only_what_could_be_counted(template: ChatTemplate) -> None:
    probes = [
        looked_at(template, "<think>\na\n</think>\n\nYes, of course you can do that today."),
        looked_at(template, "<think>\nan endless thought", "length"),
        looked_at(template, "42"),
    ]
    found = summary(probes)
    assert found["stopped"] == pytest.approx(2 / 3)
    assert found["closed"] == pytest.approx(1 / 3)
    assert found["traces"] == 2
    assert found["same_language"] == 1.0
    assert summary([looked_at(template, "42")])["same_language"] is None


def test_answers_come_back_in_the_order_asked_whatever_the_batches(model: Any, template: ChatTemplate) -> None:
    options = [SamplingOptions(6, temperature=0.0), SamplingOptions(4, temperature=0.0)]
    prompts = [question.prompt for question in questions_of(template, QUESTIONS)]
    from numpy import array

    requests = [AnswerRequest(array(prompt), options[n % 2], template.stop_ids) for n, prompt in enumerate(prompts)]
    done: list[tuple[int, int]] = []
    found = to_the_end(answering(model, requests, rows=3, progress=lambda part, whole: done.append((part, whole))))
    for number, prompt in enumerate(prompts):
        (alone,) = complete_ids(model, [prompt], options[number % 2], template.stop_ids)
        assert found[number] == alone
    assert done[-1] == (8, 8)


def test_probes_ask_as_training_shows_and_measure_greedy_and_sampled(model_folder: Path) -> None:
    found = evaluate(model_folder, ["probes"], tokens=8)
    values = found["tasks"]["probes"]
    assert values["template"] == "chatml"
    for mode in ("greedy", "sampled"):
        assert [probe["question"] for probe in values[mode]["probes"]] == list(QUESTIONS)
        assert all(0 < probe["tokens"] <= 8 for probe in values[mode]["probes"])
    assert values["greedy"]["probes"] != values["sampled"]["probes"]
    assert evaluate(model_folder, ["probes"], tokens=8) == found
    assert "probes, greedy: 8 answers" in render(found)


def test_a_model_is_asked_by_its_own_template_and_a_base_model_as_tuning_would(
    model_folder: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    assert template_of(load_tokenizer(model_folder)).history_reasoning == "drop"
    keeps = ChatTemplate(tokenizer, history_reasoning="keep")
    tokenizer.save(tmp_path / "keeps")
    (tmp_path / "keeps" / CHAT_TEMPLATE).write_text(keeps.jinja)
    assert template_of(load_tokenizer(tmp_path / "keeps")).history_reasoning == "keep"
    assert template_of(tokenizer).template == "chatml"
    bare = load_tokenizer(train_tokenizer(TEXTS, 300, tmp_path / "bare", bare=True))
    assert template_of(bare).template == "plain"


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_prompt_of_ids_reads_as_the_question_that_was_asked(tokenizer: TextTokenizer, name: str) -> None:
    template = ChatTemplate(tokenizer, name)
    turns = (Message("user", "One?"), Message("assistant", "Yes."), Message("user", ASKED))
    assert template.question(template.prompt(Conversation(turns)).tolist()) == ASKED


def test_the_command_shows_two_models_side_by_side_as_text_and_page(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("Who is <b>there</b>?\n\nWhy not?\n")
    page = tmp_path / "out" / "probes.html"
    model = str(model_folder)
    command = ["eval", model, "--tasks", "probes", "--before", model, "--tokens", "4", "--data", str(questions)]
    assert main([*command, "--page", str(page)]) == 0
    said = capsys.readouterr().out
    assert said.count("? Why not?") == 1
    assert "before greedy" in said
    assert "after sampled" in said
    html = page.read_text()
    assert "Who is &lt;b&gt;there&lt;/b&gt;?" in html
    assert html.count('<td class="question">') == 2
    assert "<th>after greedy</th>" in html
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"]["tasks"]["probes"]["greedy"] == found["tasks"]["probes"]["greedy"]


def test_side_by_side_puts_the_answers_under_each_question() -> None:
    probe = {"question": "Why?", "tokens": 2, "stop": "length", "repetition": 0.5}
    text = side_by_side({"before": [{**probe, "answer": "a\nb"}], "after": [{**probe, "answer": ""}]})
    assert text == (
        "? Why?\n  before (2 tokens, length, 50% repeated):\n    a\n    b\n"
        "  after (2 tokens, length, 50% repeated):\n    \n"
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"data": "missing.txt"}, "one question a line"),
        ({"shots": 2}, "--shots"),
        ({"data": "long.txt"}, "context"),
        ({"data": "empty.txt"}, "no question"),
    ],
)
def test_what_cannot_be_asked_is_told(model_folder: Path, tmp_path: Path, given: dict[str, Any], told: str) -> None:
    (tmp_path / "long.txt").write_text("why " * 2000)
    (tmp_path / "empty.txt").write_text("\n")
    if "data" in given:
        given = {"data": tmp_path / given["data"]}
    with pytest.raises(InputError, match=told):
        evaluate(model_folder, ["probes"], **given)


def test_only_a_line_feed_ends_a_line_of_a_file(tmp_path: Path) -> None:
    asked = [f"a{separator}b" for separator in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"]
    (tmp_path / "asked.txt").write_bytes(("\ufeff" + "\r\n".join([*asked, ""])).encode())
    assert read_lines(tmp_path / "asked.txt", "") == asked
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in asked)
    (tmp_path / "asked.jsonl").write_text(lines, encoding="utf-8")
    assert list(rows_of("lambada", tmp_path / "asked.jsonl", "text", lambda _, row: row["text"])) == asked
