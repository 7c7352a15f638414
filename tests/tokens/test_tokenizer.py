"""Texts in normal form go past the normalizer: the ids are those of the whole tokenizer, and no text that it would
change goes past it.
"""

from __future__ import annotations

import itertools
import json
import pickle
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from argonne.tokens.parsed import ParsedTokenizer, is_nfc, parse_tokenizer
from argonne.tokens.tokenizer import byte_letters

MARKS = [chr(code) for code in range(0x110000) if unicodedata.combining(chr(code))]
PIECES = [
    "e",
    "q",
    "A\u030a",
    "\u00e9",
    "\u0301",
    "\u0323",
    "\u05b9",
    "\u1e9b",
    "\u212b",
    "\ud55c",
    "\u1112",
    "\u1161",
    "\u11ab",
    " ",
    "x\n",
]
TEXTS = st.lists(
    st.one_of(st.sampled_from(PIECES), st.sampled_from(MARKS), st.characters(exclude_categories=["Cs"])), max_size=12
).map("".join)


def with_nfc(folder: Path) -> str:
    return json.dumps({**json.loads((folder / "tokenizer.json").read_text()), "normalizer": {"type": "NFC"}})


@pytest.fixture(scope="module")
def parsed(tokenizer_folder: Path) -> ParsedTokenizer:
    return parse_tokenizer(with_nfc(tokenizer_folder), tokenizer_folder)


@pytest.fixture(scope="module")
def whole(tokenizer_folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_str(with_nfc(tokenizer_folder))
    tokenizer.encode_special_tokens = True
    return tokenizer


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXTS, max_size=6))
def test_a_batch_gets_the_ids_of_the_whole_tokenizer(
    parsed: ParsedTokenizer, whole: Tokenizer, texts: list[str]
) -> None:
    expected = [whole.encode(text, add_special_tokens=False).ids for text in texts]
    assert [found.tolist() for found in parsed.encode_batch(texts)] == expected
    assert [parsed.encode(text) for text in texts] == expected


def changed(texts: Iterable[str]) -> list[str]:
    """Texts that Python holds for normal and `tokenizers` changes."""
    normalizer = normalizers.NFC()
    return [ascii(text) for text in texts if is_nfc(text) and normalizer.normalize_str(text) != text]


def test_no_pair_of_marks_that_is_normal_is_changed_by_the_normalizer() -> None:
    marks = MARKS[::5]
    assert (
        changed(f"{base}{first}{second}" for base in "eq" for first, second in itertools.product(marks, MARKS[2::5]))
        == []
    )


@pytest.mark.campaign
def test_no_character_and_no_pair_of_marks_that_is_normal_is_changed_by_the_normalizer() -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    surroundings = ("{}<A", "e{}", "e\u0301{}\u0323", "\u0323{}\u0301", "\u1112{}\u11ab")
    assert changed(around.format(character) for around in surroundings for character in characters) == []
    assert (
        changed(f"{base}{first}{second}" for base in "eq\u00e9" for first, second in itertools.product(MARKS, MARKS))
        == []
    )


def test_an_added_token_that_is_not_normal_keeps_the_normalizer_for_all(tokenizer_folder: Path) -> None:
    tree = json.loads(with_nfc(tokenizer_folder))
    added = {**tree["added_tokens"][0], "id": 10_000, "content": "e\u0301!", "normalized": True, "special": False}
    text = json.dumps({**tree, "added_tokens": [*tree["added_tokens"], added]})
    whole = Tokenizer.from_str(text)
    assert [found.tolist() for found in parse_tokenizer(text, tokenizer_folder).encode_batch(["\u00e9!"])] == [
        whole.encode("\u00e9!").ids
    ]


def test_single_texts_are_normalized_while_batches_are_encoded_beside_them(
    parsed: ParsedTokenizer, whole: Tokenizer
) -> None:
    text, expected = "cafe\u0301", whole.encode("cafe\u0301", add_special_tokens=False).ids
    with ThreadPoolExecutor(2) as pool:
        batches = [pool.submit(parsed.encode_batch, ["a plain text"] * 50) for _ in range(20)]
        assert all(parsed.encode(text) == expected for _ in range(500))
        assert len([batch.result() for batch in batches]) == 20


def test_a_tokenizer_travels_to_another_process(parsed: ParsedTokenizer) -> None:
    assert pickle.loads(pickle.dumps(parsed)).encode("cafe\u0301 <|im_end|>") == parsed.encode("cafe\u0301 <|im_end|>")


def test_every_byte_has_its_letter_as_gpt_2_gave_them() -> None:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    assert byte_letters() == letters
