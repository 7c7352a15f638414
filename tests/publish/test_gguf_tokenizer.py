"""A tokenizer in a GGUF file: the same ids in llama.cpp for every text, or refused by name."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from argonne.data import jinja
from argonne.errors import InputError
from argonne.model.build import config_from_fields, fresh_weights
from argonne.publish.gguf_export import described, write_gguf
from argonne.publish.gguf_tokenizer import (
    CONTROL,
    TAKEN,
    UNUSED,
    USER_DEFINED,
    chat_template,
    gguf_vocabulary,
    sample_texts,
)
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer
from tests.model.conftest import SIZES

Changed = Callable[[Callable[[dict[str, Any]], object]], TextTokenizer]


@pytest.fixture
def changed(tokenizer_folder: Path, tmp_path: Path) -> Changed:
    """changed(how) -> the small tokenizer with its tokenizer.json changed by a function."""

    def make(how: Callable[[dict[str, Any]], object]) -> TextTokenizer:
        said = json.loads((tokenizer_folder / "tokenizer.json").read_text())
        how(said)
        (tmp_path / "tokenizer.json").write_text(json.dumps(said))
        return load_tokenizer(tmp_path)

    return make


def split_of(said: dict[str, Any]) -> dict[str, Any]:
    return said["pre_tokenizer"]["pretokenizers"][0]


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an unknown pattern": (lambda said: split_of(said).update(pattern={"Regex": r"\d{1,3}|\w+"}), r"d\{1,3\}"),
    "an inverted pattern": (lambda said: split_of(said).update(invert=True), "the pre-tokenizer"),
    "no pre-tokenizer": (lambda said: said.update(pre_tokenizer=None), "the pre-tokenizer"),
    "a space in front": (
        lambda said: said.update(
            pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        ),
        "'add_prefix_space': True",
    ),
    "lower case": (lambda said: said.update(normalizer={"type": "Lowercase"}), "the normalizer.*Lowercase"),
    "whole words first": (lambda said: said["model"].update(ignore_merges=True), "ignore_merges = True"),
    "a token that eats spaces": (lambda said: said["added_tokens"][0].update(lstrip=True), "lstrip of the token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_do_is_refused_by_name(name: str, changed: Changed) -> None:
    how, message = REFUSED[name]
    with pytest.raises(InputError, match=rf"{message}.*which llama\.cpp cannot do; expected"):
        gguf_vocabulary(changed(how), 400)


def test_a_tokenizer_of_words_is_refused(numbers_folder: Path) -> None:
    with pytest.raises(InputError, match="its tokenizer is WordLevel"):
        gguf_vocabulary(load_tokenizer(numbers_folder), 4096)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    with pytest.raises(InputError, match=rf"ids reach {tokenizer.vocab_size - 1}, the model has 300 rows"):
        gguf_vocabulary(tokenizer, 300)


@pytest.mark.parametrize("ends", [None, [1, 2, 3, 4]])
def test_a_text_that_would_end_at_another_token_is_refused(ends: Any, tokenizer_folder: Path) -> None:
    with pytest.raises(InputError, match=r"expected one to three .*name them as eos_token_id"):
        described(load_tokenizer(tokenizer_folder), 400, {"eos_id": ends, "bos_id": None, "pad_id": None})


def test_control_tokens_are_told_from_those_that_a_text_may_hold(tokenizer_folder: Path) -> None:
    found = gguf_vocabulary(load_tokenizer(tokenizer_folder), 410)
    types = dict(zip(found.tokens, found.types, strict=True))
    assert types["<|endoftext|>"] == types["<|im_end|>"] == CONTROL
    assert types["<think>"] == USER_DEFINED
    assert types["[PAD409]"] == UNUSED
    assert found.notes == []


def test_nfc_and_names_that_llama_cpp_takes_are_told(changed: Changed) -> None:
    def change(said: dict[str, Any]) -> None:
        said["normalizer"] = {"type": "NFC"}
        token = next(token for token in said["added_tokens"] if not token["special"])
        said["model"]["vocab"][TAKEN[0]] = said["model"]["vocab"].pop(token["content"])
        token["content"] = TAKEN[0]

    tokenizer = changed(change)
    notes = gguf_vocabulary(tokenizer, 400).notes
    assert "give it texts in NFC" in notes[0]
    assert TAKEN[0] in notes[1]
    assert not any(TAKEN[0] in text for text in sample_texts(tokenizer, 100)[::2])


def test_sample_texts_are_in_nfc_and_always_the_same(tokenizer_folder: Path) -> None:
    texts = sample_texts(load_tokenizer(tokenizer_folder), 200)
    assert len(set(texts)) == 200
    assert all(unicodedata.is_normalized("NFC", text) for text in texts)
    assert texts == sample_texts(load_tokenizer(tokenizer_folder), 200)


@pytest.mark.parametrize(("name", "pre"), [("gpt2", "gpt-2"), ("qwen2.5", "qwen2"), ("qwen3", "qwen2")])
def test_tokenizers_of_released_models_give_the_same_ids(name: str, pre: str, shared: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama_cpp is not installed (pip install llama-cpp-python)")
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    size = tokenizer.vocab_size
    words = described(tokenizer, size, {"eos_id": tokenizer.eos_id or size - 1, "bos_id": None, "pad_id": None})
    assert words.vocabulary.pre == pre
    fields = {**SIZES, "vocab_size": size, "hidden_size": 8, "num_hidden_layers": 1}
    write_gguf(tmp_path / "model.gguf", sorted_weights(fields), "f32", words)
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    try:
        for text in sample_texts(tokenizer, 200):
            assert model.tokenize(text.encode(), False, False) == tokenizer.encode(text), text
    finally:
        model.close()


def sorted_weights(fields: dict[str, Any]) -> Any:
    from dataclasses import replace

    fresh = fresh_weights(config_from_fields(fields), seed=0)
    return replace(fresh, tensors=lambda: iter(sorted(fresh.tensors())))


def test_a_chat_template_prints_the_same_without_transformers_generation_blocks(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    import shutil

    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers import AutoTokenizer

    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    (folder / "chat_template.jinja").write_text(jinja.chatml(True))
    found = chat_template(load_tokenizer(folder))
    assert found is not None
    assert "generation %}" not in found.replace("add_generation", "")
    turns = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "<think>\n1 + 1\n</think>\n\nTwo."}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, tokenize=False)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert environment.from_string(found).render(messages=turns) == theirs
