"""Which token ends a document: the end of text, not the end of a turn; what was made with another keeps it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from argonne import layout
from argonne.config import BatchSection
from argonne.data.dataset import open_training_data
from argonne.data.phases import end_of
from argonne.errors import InputError
from argonne.model.load import stop_ids as stored_stop_ids
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.serve.engine import stop_ids
from argonne.tokens.formats import open_tokens
from argonne.tokens.shards import header
from argonne.tokens.tokenizer import load_tokenizer
from tests.data.rows import section
from tests.prepare.helpers import QUIET, documents_of, jsonl

END, TURN_END = "<|endoftext|>", "<|im_end|>"


def variant(base: Path, folder: Path, config: dict[str, Any], **files: Any) -> Path:
    """A copy of a tokenizer of ours under another configuration. files: more of them, by name."""
    shutil.copytree(base, folder)
    for name, tree in {"tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))
    return folder


@pytest.fixture
def qwen_like(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """Its configuration names the turn end as eos_token, as Qwen's chat tokenizers do."""
    return variant(tokenizer_folder, tmp_path / "qwen", {"eos_token": TURN_END, "pad_token": END})


def test_an_eos_token_that_ends_a_turn_does_not_end_a_document(qwen_like: Path) -> None:
    tokenizer = load_tokenizer(qwen_like)
    end, turn_end = tokenizer.token_to_id(END), tokenizer.token_to_id(TURN_END)
    assert (tokenizer.eos_id, tokenizer.named_end_id, tokenizer.stop_ids) == (end, turn_end, (end, turn_end))
    assert tokenizer.end_told == (
        f"documents end with '<|endoftext|>' (id {end}): the eos_token that is named, '<|im_end|>', ends a turn"
    )


def test_qwen_ends_documents_with_its_end_of_text(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers/qwen3")
    assert tokenizer.end_told.startswith("documents end with '<|endoftext|>' (id 151643)")
    assert tokenizer.stop_ids == (151643, 151645)


def test_the_special_tokens_map_names_what_the_configuration_does_not(tokenizer_folder: Path, tmp_path: Path) -> None:
    named = {"eos_token": {"content": "<|spare_1|>"}, "pad_token": "<|spare_2|>"}
    config = {"eos_token": None, "pad_token": "<|pad|>"}
    folder = variant(tokenizer_folder, tmp_path / "made", config, special_tokens_map=named)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == tokenizer.token_to_id("<|spare_1|>")
    assert tokenizer.pad_id == tokenizer.token_to_id("<|pad|>")
    (tmp_path / "config.json").write_text("{}")
    assert stored_stop_ids(folder, {})["eos_id"] == tokenizer.eos_id


def test_of_several_ends_the_line_says_which_and_why(tokenizer_folder: Path, tmp_path: Path) -> None:
    tree = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 400, "content": "</s>"})
    named = load_tokenizer(variant(tokenizer_folder, tmp_path / "named", {"eos_token": "</s>"}, tokenizer=tree))
    silent = load_tokenizer(variant(tokenizer_folder, tmp_path / "silent", {}, tokenizer=tree))
    other = "it is the eos_token that is named; '<|endoftext|>' could too"
    assert named.end_told == f"documents end with '</s>' (id {named.eos_id}): {other}"
    assert silent.end_told == f"documents end with '{END}' (id 0): no eos_token is named; '</s>' could too"
    only = load_tokenizer(tokenizer_folder)
    assert only.end_told == f"documents end with '{END}' (id 0)"


def test_generation_stops_at_both_ends_and_at_what_the_model_names(qwen_like: Path) -> None:
    tokenizer = load_tokenizer(qwen_like)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=7))
    assert stop_ids(model, tokenizer) == sorted({7, *tokenizer.stop_ids})
    # Weights that name no end themselves: of a turn first, as those of a chat model do.
    assert stored_stop_ids(qwen_like, {})["eos_id"] == [tokenizer.named_end_id, tokenizer.eos_id]


def prepared(tmp_path: Path, tokenizer: Path, **more: Any) -> PrepareOptions:
    source = tmp_path / "in.jsonl"
    if not source.exists():
        jsonl(source, [{"text": f"the {number} fox <|im_end|> <|endoftext|>"} for number in range(30)])
    return PrepareOptions((str(source),), tmp_path / "out", tokenizer, workers=1, **more)


def test_documents_end_with_it_and_the_start_says_so(
    qwen_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(qwen_like)
    documents = documents_of(prepare(prepared(tmp_path, qwen_like)))
    assert f"\n{tokenizer.end_told}\n" in capsys.readouterr().err
    assert len(documents) == 30
    assert all(ids[-1] == tokenizer.eos_id and not {*ids[:-1]} & tokenizer.controls for ids in documents)


def test_training_from_text_says_it_too(qwen_like: Path, tmp_path: Path) -> None:
    options = prepared(tmp_path, qwen_like)
    asked = section(length=8, input=options.input, tokenizer=str(qwen_like), prefetch="all")
    data = open_training_data(asked, BatchSection(tokens_per_step=16), 0, run_folder=tmp_path / "run")
    try:
        assert f"  {load_tokenizer(qwen_like).end_told}" in data.description
    finally:
        data.close()


def earlier(folder: Path, name: str, tokenizer: Path) -> int:
    """Make the plan or manifest of `folder` one of an earlier version, which ended documents with the turn end."""
    tree, end = json.loads((folder / name).read_text()), load_tokenizer(tokenizer).named_end_id
    tree["tokenizer"]["eos_id"] = end
    (folder / name).write_text(json.dumps(tree))
    assert end is not None
    return end


def test_unfinished_work_of_an_earlier_version_goes_on_with_its_end(
    qwen_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = prepared(tmp_path, qwen_like)
    with monkeypatch.context() as patched:
        patched.setattr("argonne.prepare.prepare.encode_units", lambda *_: (_ for _ in ()).throw(InputError("ended")))
        with pytest.raises(InputError, match="ended"):
            prepare(options)
    turn_end = earlier(options.out, layout.UNITS_PLAN, qwen_like)
    assert {ids[-1] for ids in documents_of(prepare(options, QUIET))} == {turn_end}
    assert "documents end with" in capsys.readouterr().err


def test_a_finished_set_of_an_earlier_version_stays_what_it_is(qwen_like: Path, tmp_path: Path) -> None:
    options = prepared(tmp_path, qwen_like)
    prepare(options, QUIET)
    turn_end = earlier(options.out, layout.MANIFEST, qwen_like)
    assert prepare(options, QUIET) == options.out
    opened, tokenizer = open_tokens(options.out), load_tokenizer(qwen_like)
    assert end_of(opened, tokenizer) == turn_end
    assert tokenizer.ending_as(end_of(opened, tokenizer)).end_told.endswith("(id 3): as it was made")


def test_another_end_than_the_sets_is_another_set(qwen_like: Path, tmp_path: Path) -> None:
    prepare(prepared(tmp_path, qwen_like), QUIET)
    (qwen_like / "tokenizer_config.json").write_text('{"eos_token": "<|spare_3|>"}')
    with pytest.raises(InputError, match="made with another end of documents"):
        prepare(prepared(tmp_path, qwen_like), QUIET)


@pytest.mark.parametrize("token", [END, TURN_END])
def test_tokens_of_others_end_documents_with_what_they_hold(token: str, qwen_like: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(qwen_like)
    ids = np.tile([40, 41, tokenizer.token_to_id(token) or 0, 42], 9)
    (tmp_path / "train.bin").write_bytes(header("uint16", len(ids)) + ids.astype("<u2").tobytes())
    assert end_of(open_tokens(tmp_path / "train.bin"), tokenizer) == tokenizer.token_to_id(token)


def test_documents_do_not_see_one_another_whichever_token_ends_them(qwen_like: Path, tmp_path: Path) -> None:
    end, turn_end = load_tokenizer(qwen_like).stop_ids
    paths = []
    for name, token in (("a", end), ("b", turn_end)):
        (tmp_path / name).mkdir()
        ids = np.tile([40, 41, token, 42], 16)
        (tmp_path / name / "train.bin").write_bytes(header("uint16", len(ids)) + ids.astype("<u2").tobytes())
        paths.append(tmp_path / name / "train.bin")
    asked = section(*paths, length=8, document_mask=True, tokenizer=str(qwen_like), weights=(1.0, 1.0))
    rows = open_training_data(asked, BatchSection(tokens_per_step=32), 0).read(0, 0, 4, 4)
    assert {*rows["source"].values.tolist()} == {0, 1}
    assert (rows["position_ids"].values == [0, 1, 2, 0, 1, 2, 3, 0]).all()


def test_a_model_that_was_trained_with_another_end_is_asked_with_it(qwen_like: Path) -> None:
    tokenizer = load_tokenizer(qwen_like)
    end, turn_end = tokenizer.stop_ids
    assert load_tokenizer(qwen_like).ending_as([turn_end, end]).eos_id == end
    assert load_tokenizer(qwen_like).ending_as(turn_end).eos_id == turn_end
    assert load_tokenizer(qwen_like).ending_as(None).eos_id == end
