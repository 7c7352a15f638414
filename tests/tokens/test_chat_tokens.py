"""Tokenizers without turn tokens get them behind their other ids."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from argonne.errors import InputError
from argonne.layout import CONTENT_TOKENS, TURN_TOKENS
from argonne.tokens.chat_tokens import kept_chat_tokens
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from tests.tokensets import words


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    texts = (words(200, seed) for seed in range(5))
    return load_tokenizer(train_tokenizer(texts, 300, tmp_path_factory.mktemp("bare") / "bare", bare=True))


def extended(tokenizer: TextTokenizer, folder: Path) -> tuple[TextTokenizer, list[str]]:
    """(the tokenizer with the chat tokens, those that are new to it)."""
    made = kept_chat_tokens(tokenizer, folder)
    assert made.added is not None
    return made, list(made.added.names)


def check(before: TextTokenizer, after: TextTokenizer, added: list[str]) -> None:
    assert added == [*TURN_TOKENS, *CONTENT_TOKENS]
    assert [after.token_to_id(token) for token in added] == list(range(before.vocab_size, after.vocab_size))
    assert after.encode(words(300)) == before.encode(words(300))
    assert after.encode("<think>") == [after.token_to_id("<think>")]
    assert after.token_to_id("<|im_end|>") not in after.encode("a<|im_end|>")
    assert (after.eos_id, after.pad_id) == (before.eos_id, before.pad_id)


def test_a_bare_tokenizer_gets_the_chat_tokens_behind_its_ids(bare: TextTokenizer, tmp_path: Path) -> None:
    made, added = extended(bare, tmp_path / "chat")
    check(bare, made, added)
    assert load_tokenizer(tmp_path / "chat").fingerprint == made.fingerprint


def test_gpt2_gets_the_chat_tokens_behind_its_ids(shared: Path, tmp_path: Path) -> None:
    before = load_tokenizer(shared / "tokenizers" / "gpt2")
    made, added = extended(before, tmp_path / "chat")
    check(before, made, added)
    assert made.token_to_id("<|im_start|>") == 50257


def test_transformers_reads_the_same_ids(bare: TextTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made, added = extended(bare, tmp_path / "chat")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "chat"), local_files_only=True)
    assert theirs.convert_tokens_to_ids(added) == [made.token_to_id(token) for token in added]
    assert len(theirs) == made.vocab_size


def test_a_tokenizer_that_has_them_stays_as_it_is(tokenizer_folder: Path, tmp_path: Path) -> None:
    before = load_tokenizer(tokenizer_folder)
    made, added = extended(before, tmp_path / "chat")
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
        extended(load_tokenizer(tmp_path / "holes"), tmp_path / "chat")
    assert not (tmp_path / "chat").exists()


def test_what_a_folder_keeps_is_written_once_and_found_again(bare: TextTokenizer, tmp_path: Path) -> None:
    first = kept_chat_tokens(bare, tmp_path / "kept")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    again = kept_chat_tokens(bare, tmp_path / "kept")
    assert (again.fingerprint, again.added) == (first.fingerprint, first.added)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()} == written
    assert again.added is not None
    assert again.added.names == (*TURN_TOKENS, *CONTENT_TOKENS)
    assert again.added.ids == range(bare.vocab_size, again.vocab_size)


def test_a_folder_that_extends_another_tokenizer_is_written_anew(bare: TextTokenizer, tmp_path: Path) -> None:
    other = load_tokenizer(train_tokenizer([words(50)], 290, tmp_path / "other", bare=True))
    kept_chat_tokens(other, tmp_path / "kept")
    made = kept_chat_tokens(bare, tmp_path / "kept")
    assert made.added is not None
    assert made.added.base == bare.fingerprint
    assert made.encode(words(300)) == bare.encode(words(300))


def test_processes_that_ask_at_once_find_the_same(bare: TextTokenizer, tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        asked = [pool.submit(made_in, bare.folder, tmp_path / "kept") for _ in range(12)]
        found = [each.result() for each in asked]
    assert len(set(found)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".kept.lock", "kept"]


def made_in(base: Path, folder: Path) -> tuple[str, int]:
    """Its fingerprint, and when its file was written."""
    made = kept_chat_tokens(load_tokenizer(base), folder)
    return made.fingerprint, (folder / "tokenizer.json").stat().st_mtime_ns


@pytest.mark.parametrize("kind", ["Unigram", "WordLevel", "WordPiece"])
def test_other_kinds_of_vocabularies_get_them_too(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    entries = ["<unk>", "</s>", "a", "b", "▁a"]
    ids = {entry: number for number, entry in enumerate(entries)}
    made = {
        "Unigram": lambda: models.Unigram([(entry, -1.0) for entry in entries], unk_id=0),
        "WordLevel": lambda: models.WordLevel(ids, unk_token="<unk>"),
        "WordPiece": lambda: models.WordPiece(ids, unk_token="<unk>"),
    }[kind]()
    (tmp_path / "base").mkdir()
    Tokenizer(made).save(str(tmp_path / "base" / "tokenizer.json"))
    base = load_tokenizer(tmp_path / "base")
    after, added = extended(base, tmp_path / "chat")
    assert [after.token_to_id(token) for token in added] == list(range(5, 13))
    assert after.encode("a") == base.encode("a")
