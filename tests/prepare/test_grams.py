"""When a text counts as found in another: long ones by runs, short ones whole, those without spaces by characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.prepare import grams, texts
from argonne.prepare.grams import Wanted, grams_of, how, words_of
from argonne.prepare.texts import LongText
from tests.tokensets import words

CHINESE = "中国的首都是哪里请从以下选项中选择一个最合适的答案并说明你选择这个答案的理由和依据是什么"
THAI = "เมืองหลวงของประเทศไทยคือเมืองอะไรและตั้งอยู่ในภาคใดของประเทศจงอธิบายให้ละเอียด"
HINDI = "भारत की राजधानी कौन सी है और यह किस नदी के किनारे पर बसी हुई है"


def numbered(count: int) -> str:
    return " ".join(f"w{number}" for number in range(count))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (numbered(13), "words"),
        (numbered(12), "short"),
        (numbered(8), "short"),
        (numbered(7), "none"),
        ("What is the capital of France?", "none"),
        (CHINESE, "characters"),
        (CHINESE[:13], "characters"),
        (CHINESE[:12], "none"),
        (THAI, "characters"),
        (THAI[:31], "none"),
        (HINDI, "words"),
        (" ".join(HINDI.split()[:7]), "none"),
    ],
)
def test_what_is_long_enough_is_looked_for(text: str, found: str) -> None:
    assert how(words_of(text)) == found
    assert Wanted(set(grams_of(words_of(text)))).are_in(f"so: {text.upper()}!") == (found != "none")


def test_thirteen_words_in_a_row_of_a_longer_text_are_enough_and_twelve_are_not() -> None:
    wanted = Wanted(set(grams_of(words_of(numbered(40)))))
    assert wanted.are_in(" ".join(f"w{number}" for number in range(20, 33)))
    assert not wanted.are_in(" ".join(f"w{number}" for number in range(20, 32)))


def test_a_short_text_is_found_as_a_whole_alone() -> None:
    wanted = Wanted(set(grams_of(words_of(numbered(9)))))
    assert wanted.are_in(f"It says {numbered(9)}.")
    assert not wanted.are_in(f"It says {numbered(8)}.")


def test_text_without_spaces_is_found_by_runs_of_its_characters_whatever_stands_around_them() -> None:
    wanted = Wanted(set(grams_of(words_of(CHINESE))))
    assert wanted.are_in(f"前文{CHINESE[10:31]}后文")
    assert not wanted.are_in(f"前文{CHINESE[10:30]}后文")
    thai = Wanted(set(grams_of(words_of(THAI))))
    assert thai.are_in(f"ก{THAI[10:62]}ก")
    assert not thai.are_in(f"ก{THAI[10:61]}ก")


def test_the_rule_of_before_knows_texts_of_thirteen_words_alone() -> None:
    assert list(grams_of(words_of(numbered(12), 1), 1)) == []
    assert list(grams_of(words_of(CHINESE, 1), 1)) == []
    assert list(grams_of(words_of(numbered(14), 1), 1)) == list(grams_of(words_of(numbered(14))))


@given(st.integers(0, 60), st.sampled_from(["", " ", "\n", "。"]), st.sampled_from([numbered(14), CHINESE, THAI]))
def test_a_long_document_is_searched_across_the_places_where_it_is_cut(before: int, between: str, text: str) -> None:
    wanted = Wanted(set(grams_of(words_of(text))))
    document = f"{'字' * before}{between} {text} {words(20)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "READ_BYTES", 17)
        assert wanted.are_in(LongText(document.encode()))
        assert not wanted.are_in(LongText(f"{'字' * before} {words(20)}".encode()))


def test_the_characters_that_stand_for_words_are_letters_and_marks() -> None:
    for character in "ひカ々中豈𠀀":
        assert words_of(character * 2) == [character] * 2, character
    assert words_of("한국어 e\u0301te\u0301 हिन्दी") == ["한국어", "e\u0301te\u0301", "हिन्दी"]
    assert grams.GRAM_WORDS == 13
