"""Tokenizers without turn tokens get them behind their other ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from argonne.errors import InputError
from argonne.tokens.tokenizer import (
    CONTENT_TOKENS,
    TURN_TOKENS,
    TextTokenizer,
    add_chat_tokens,
    load_tokenizer,
    train_tokenizer,
)
from tests.tokensets import words


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    texts = (words(200, seed) for seed in range(5))
    return load_tokenizer(train_tokenizer(texts, 300, tmp_path_factory.mktemp("bare") / "bare", bare=True))


def check(before: TextTokenizer, after: TextTokenizer, added: list[str]) -> None:
    assert added == [*TURN_TOKENS, *CONTENT_TOKENS]
    assert [after.token_to_id(token) for token in added] == list(range(before.vocab_size, after.vocab_size))
    assert after.encode(words(300)) == before.encode(words(300))
    assert after.encode("<think>") == [after.token_to_id("<think>")]
    assert after.token_to_id("<|im_end|>") not in after.encode("a<|im_end|>")
    assert (after.eos_id, after.pad_id) == (before.eos_id, before.pad_id)


def test_a_bare_tokenizer_gets_the_chat_tokens_behind_its_ids(bare: TextTokenizer, tmp_path: Path) -> None:
    made, added = add_chat_tokens(bare, tmp_path / "chat")
    check(bare, made, added)
    assert load_tokenizer(tmp_path / "chat").fingerprint == made.fingerprint


def test_gpt2_gets_the_chat_tokens_behind_its_ids(shared: Path, tmp_path: Path) -> None:
    before = load_tokenizer(shared / "tokenizers" / "gpt2")
    made, added = add_chat_tokens(before, tmp_path / "chat")
    check(before, made, added)
    assert made.token_to_id("<|im_start|>") == 50257


def test_transformers_reads_the_same_ids(bare: TextTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made, added = add_chat_tokens(bare, tmp_path / "chat")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "chat"), local_files_only=True)
    assert theirs.convert_tokens_to_ids(added) == [made.token_to_id(token) for token in added]
    assert len(theirs) == made.vocab_size


def test_a_tokenizer_that_has_them_stays_as_it_is(tokenizer_folder: Path, tmp_path: Path) -> None:
    before = load_tokenizer(tokenizer_folder)
    made, added = add_chat_tokens(before, tmp_path / "chat")
    assert (added, made.vocab_size) == ([], before.vocab_size)


def test_a_vocabulary_with_a_hole_is_refused(bare: TextTokenizer, tmp_path: Path) -> None:
    tree = json.loads((bare.folder / "tokenizer.json").read_text())
    del tree["model"]["vocab"][max(tree["model"]["vocab"], key=tree["model"]["vocab"].get)]
    vocabulary = tree["model"]["vocab"]
    vocabulary["hole"] = max(vocabulary.values()) + 9
    tree["model"]["merges"] = []
    (tmp_path / "holes").mkdir()
    (tmp_path / "holes" / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match="its vocabulary has holes"):
        add_chat_tokens(load_tokenizer(tmp_path / "holes"), tmp_path / "chat")
    assert not (tmp_path / "chat").exists()
