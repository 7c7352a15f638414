"""Bits per byte end to end on a tiny untrained model, its numbers checked against plain loops."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.errors import InputError
from argonne.evaluate.bits_per_byte import BitsPerByte, ratio, windows
from argonne.evaluate.requests import Score, ScoreRequest, TaskContext
from argonne.evaluate.run import baseline_results, evaluate, render
from argonne.evaluate.scorer import scoring
from argonne.evaluate.tasks import make_tasks
from argonne.evaluate.texts import open_texts
from argonne.model.build import build_model, config_from_fields
from argonne.model.save import save_model_folder
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.presets import preset
from argonne.serve.engine import to_the_end
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer

WORDS = ["time", "ago", "there", "was", "a", "model", "Straße", "naïve", "你好", "and", "then", "text"]


def score(model: Any, requests: Sequence[ScoreRequest], **how: Any) -> list[Score]:
    found = to_the_end(scoring(model, requests, **how))
    return [found[number] for number in range(len(requests))]


def texts(count: int, seed: int) -> list[str]:
    chooser = np.random.default_rng(seed)
    return [" ".join(chooser.choice(WORDS, size=chooser.integers(3, 90))) + "." for _ in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="module")
def token_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    source = write_jsonl(folder / "text.jsonl", texts(150, seed=1))
    return prepare(
        PrepareOptions(input=(str(source),), out=folder / "set", train_tokenizer=300, hold_out=0.1, workers=1)
    )


@pytest.fixture(scope="module")
def tokenizer(token_set: Path) -> TextTokenizer:
    return load_tokenizer(token_set / "tokenizer")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 48,
        "sliding_window": 8,
    }
    model = build_model(config_from_fields({**preset("nano-3.0").fields, **sizes}), seed=3)
    tokenizer.save(folder)
    save_model_folder(model, folder, eos_id=tokenizer.eos_id, bos_id=None, pad_id=tokenizer.pad_id)
    return folder


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    from argonne.model.load import load_model

    return load_model(model_folder).model


def plain_bits(model: Any, document: np.ndarray, eos_id: int) -> float:
    """-log2 p of every id of the document, one forward pass a window, straight from the definition."""
    ids, total = [eos_id, *document.tolist()], 0.0
    for start in range(0, len(ids) - 1, 48):
        window = torch.tensor([ids[start : start + 49]])
        with torch.no_grad():
            logits = model(input_ids=window[:, :-1], use_cache=False).logits.double()
        total += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum")) / math.log(2)
    return total


def test_bits_per_byte_of_the_held_out_part_equals_a_plain_loop(
    model_folder: Path, model: Any, token_set: Path, tokenizer: TextTokenizer
) -> None:
    held_out = open_texts(token_set, tokenizer)
    bits = [plain_bits(model, document, tokenizer.eos_id) for document in held_out.documents]
    sizes = [len(tokenizer.decode(document[:-1]).encode()) for document in held_out.documents]
    found = evaluate(model_folder, ["bpb"], token_set, device="cpu")["tasks"]["bpb"]
    assert found["bits_per_byte"] == pytest.approx(sum(bits) / sum(sizes), rel=1e-5)
    assert found["bytes"] == sum(sizes)
    assert found["documents"] == found["documents_available"] == len(bits) > 5
    assert found["tokens"] == sum(map(len, held_out.documents))
    assert found["loss"] == pytest.approx(sum(bits) * math.log(2) / found["tokens"], rel=1e-5)
    residuals = [bit - found["bits_per_byte"] * size for bit, size in zip(bits, sizes, strict=True)]
    error = math.sqrt(len(bits) / (len(bits) - 1) * sum(value**2 for value in residuals)) / sum(sizes)
    assert found["standard_error"] == pytest.approx(error, rel=1e-4)


def test_each_band_of_positions_has_its_bits_per_byte(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    task = BitsPerByte()
    data = write_jsonl(tmp_path / "a.jsonl", [" ".join(["there was a model and then text"] * 40), "time ago"])
    requests = task.requests(TaskContext(tokenizer, 128, data))
    assert len(requests) > 2  # windows of one document, and the other
    planted = [np.arange(1.0, len(request.ids)) for request in requests]  # bits of each place in its window
    found = task.measure([Score(-bits * math.log(2), np.zeros(len(bits), bool)) for bits in planted])["by_position"]
    expected = {}
    for first, last in ((0, 32), (32, 64), (64, 128)):
        bits = sum(part[first:last].sum() for part in planted)
        sizes = [tokenizer.token_bytes[request.ids[1:]][first:last] for request in requests]
        expected[f"{first + 1}-{last}"] = {
            "bits_per_byte": pytest.approx(bits / sum(part.sum() for part in sizes)),
            "tokens": sum(map(len, sizes)),
        }
    assert found == expected


def test_text_files_give_the_same_as_a_plain_loop(
    model_folder: Path, model: Any, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    documents = texts(6, seed=9)
    found = evaluate(model_folder, ["bpb"], write_jsonl(tmp_path / "a.jsonl", documents), device="cpu")["tasks"]["bpb"]
    bits = sum(
        plain_bits(model, np.array([*tokenizer.encode(text), tokenizer.eos_id]), tokenizer.eos_id) for text in documents
    )
    assert found["bits_per_byte"] == pytest.approx(bits / sum(len(text.encode()) for text in documents), rel=1e-5)
    assert found["documents"] == 6


def test_rows_that_are_no_documents_are_counted(model_folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a model", "", "and then"])
    found = evaluate(model_folder, ["bpb"], path, device="cpu")["tasks"]["bpb"]
    assert (found["documents"], found["rows_dropped"]) == (2, {"empty": 1})


def test_a_limit_takes_whole_documents_and_says_how_many_there_were(model_folder: Path, token_set: Path) -> None:
    whole = evaluate(model_folder, ["bpb"], token_set, device="cpu")["tasks"]["bpb"]
    part = evaluate(model_folder, ["bpb"], token_set, limit=whole["tokens"] // 2, device="cpu")["tasks"]["bpb"]
    assert 0 < part["documents"] < whole["documents"] == part["documents_available"]
    assert part["tokens"] <= whole["tokens"] // 2


def test_the_answer_is_json_and_has_a_line_for_a_person(model_folder: Path, token_set: Path) -> None:
    calls: list[tuple[int, int]] = []
    found = evaluate(
        model_folder, ["bpb"], token_set, device="cpu", progress=lambda done, total: calls.append((done, total))
    )
    assert json.loads(json.dumps(found)) == found
    assert calls[-1][0] == calls[-1][1] > 0
    assert f"bpb: {found['tasks']['bpb']['bits_per_byte']:.4f} bits per byte" in render(found)


@settings(max_examples=100, deadline=None)
@given(st.integers(min_value=1, max_value=200), st.integers(min_value=1, max_value=40))
def test_every_token_is_a_target_exactly_once(length: int, context: int) -> None:
    document = np.arange(1, length + 1)
    cut = windows(document, 0, context)
    assert np.concatenate([window[1:] for window in cut]).tolist() == document.tolist()
    assert all(len(window) <= context + 1 for window in cut)
    assert [int(window[0]) for window in cut] == [0, *(int(window[-1]) for window in cut[:-1])]


def test_scores_come_in_the_order_asked_and_do_not_depend_on_the_batch(model: Any) -> None:
    chooser = np.random.default_rng(2)
    requests = [
        ScoreRequest(chooser.integers(0, 300, size=size), start=1 + size // 4) for size in (5, 49, 12, 2, 30, 30, 7)
    ]
    together = score(model, requests, tokens_a_batch=200)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = score(model, [request])
        np.testing.assert_allclose(answer.log_probabilities, alone.log_probabilities, atol=1e-5)
        assert len(answer.log_probabilities) == len(answer.greedy) == len(request.ids) - request.start


def test_greedy_marks_the_models_first_choice(model: Any) -> None:
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([[4, 5]]), use_cache=False).logits[0, -1].argmax())
    hit, miss = score(
        model, [ScoreRequest(np.array([4, 5, best]), 2), ScoreRequest(np.array([4, 5, (best + 1) % 300]), 2)]
    )
    assert hit.greedy.tolist() == [True]
    assert miss.greedy.tolist() == [False]


@pytest.mark.parametrize(("size", "start"), [(50, 1), (5, 0), (5, 5)])
def test_a_request_that_does_not_fit_is_refused(model: Any, size: int, start: int) -> None:
    with pytest.raises(InputError, match=f"request: {size} ids scored from {start}"):
        score(model, [ScoreRequest(np.zeros(size, dtype=np.int64), start)])


def test_broken_weights_are_refused_not_averaged_away(model_folder: Path) -> None:
    from argonne.model.load import load_model

    broken = load_model(model_folder).model
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        score(broken, [ScoreRequest(np.array([1, 2, 3]))])


def test_bad_input_is_named(model_folder: Path, token_set: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no task 'bbp'; did you mean 'bpb'"):
        make_tasks(["bbp"])
    with pytest.raises(InputError, match="limit: found 0"):
        evaluate(model_folder, ["bpb"], token_set, limit=0, device="cpu")
    with pytest.raises(InputError, match="no data given"):
        evaluate(model_folder, ["bpb"], device="cpu")
    with pytest.raises(InputError, match="matches no file"):
        evaluate(model_folder, ["bpb"], tmp_path / "none.txt", device="cpu")
    source = write_jsonl(tmp_path / "t.jsonl", texts(40, seed=4))
    bare = prepare(
        PrepareOptions(input=(str(source),), out=tmp_path / "bare", tokenizer=token_set / "tokenizer", workers=1)
    )
    with pytest.raises(InputError, match="holds no held-out documents"):
        evaluate(model_folder, ["bpb"], bare, device="cpu")
    other = prepare(
        PrepareOptions(input=(str(source),), out=tmp_path / "other", train_tokenizer=310, hold_out=0.2, workers=1)
    )
    with pytest.raises(InputError, match="made with another tokenizer"):
        evaluate(model_folder, ["bpb"], other, device="cpu")


def test_the_standard_error_shrinks_with_the_square_root_of_the_documents() -> None:
    chooser = np.random.default_rng(0)
    sizes = chooser.integers(50, 500, size=40_000).astype(float)
    bits = sizes * chooser.normal(2.0, 0.3, size=40_000)
    errors = [ratio(bits[:count], sizes[:count])[1] or 0.0 for count in (400, 40_000)]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.15)
    found = [ratio(bits[start : start + 400], sizes[start : start + 400])[0] for start in range(0, 40_000, 400)]
    assert np.std(found) == pytest.approx(errors[0], rel=0.25)
    assert ratio(np.array([3.0]), np.array([2.0])) == (1.5, None)


def test_baselines_are_measured_on_the_same_documents(
    token_set: Path, tokenizer: TextTokenizer, model_folder: Path
) -> None:
    found = baseline_results(token_set, tokenizer)
    assert found["bytes"] == evaluate(model_folder, ["bpb"], token_set, device="cpu")["tasks"]["bpb"]["bytes"]
    assert found["bigram"] < found["unigram"] < found["uniform"]
    assert found["xz_after_training_text"] < found["xz"]
