"""The one rule by which a text is found in another, for `--decontaminate` and for `--contamination`: 13 words in a row,
case and punctuation aside (Brown et al. 2020, arXiv 2005.14165, appendix C); a text of 8 to 12 words as a whole, as
there. Of fewer words too many are said everywhere ("what is the capital of France").

Where words are not parted by spaces each character stands for a part of one: by what a translation takes, 1.6 Chinese
or Japanese ones are a word, and 4 of Thai, Lao, Khmer or Burmese. So 21 and 52 characters in a row, from 13 and 32 on.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

from argonne.prepare.texts import LongText, Text

GRAM_WORDS, FEWEST_WORDS = 13, 8
WORD, IDEOGRAM, LETTER = 8, 5, 2  # what each counts, in eighths of a word
IDEOGRAMS = "\u3005-\u3007\u3041-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
LETTERS = "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u1000-\u1049\u1050-\u109f\u1780-\u17d3"
MARKS = "\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"  # Python's \w lacks them

Gram = tuple[str, ...]


@functools.cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    parted, apart = rf"\w{MARKS}", IDEOGRAMS + LETTERS
    return (
        re.compile(r"\w+"),
        re.compile(f"[{MARKS}{apart}]"),
        re.compile(f"[{apart}]|(?:(?![{apart}])[{parted}])+"),
        re.compile(f"[{IDEOGRAMS}]"),
        re.compile(f"[{LETTERS}]"),
    )


def words_of(text: str, rule: int = 2) -> list[str]:
    """Its words, lower case, without punctuation; where no spaces part them, its characters. Rule 1: as before."""
    simple, special, every, *_ = _patterns()
    text = text.lower()
    return (simple if rule == 1 or text.isascii() or not special.search(text) else every).findall(text)


def _sizes(words: Sequence[str], rule: int) -> list[int]:
    *_, ideogram, letter = _patterns()
    if rule == 1:
        return [WORD] * len(words)
    return [IDEOGRAM if ideogram.match(word) else LETTER if letter.match(word) else WORD for word in words]


def grams_of(words: Sequence[str], rule: int = 2) -> Iterator[Gram]:
    """The runs by which a text is found: every one as long as 13 words; the whole of one as long as 8; else none."""
    sizes = _sizes(words, rule)
    stop = size = 0
    for start in range(len(words)):
        while size < GRAM_WORDS * WORD and stop < len(words):
            size, stop = size + sizes[stop], stop + 1
        if size < GRAM_WORDS * WORD:
            if start == 0 and size >= FEWEST_WORDS * WORD and rule > 1:
                yield tuple(words)
            return
        yield tuple(words[start:stop])
        size -= sizes[start]


def how(words: Sequence[str], rule: int = 2) -> str:
    """By what a text is looked for: "words", "short" (fewer words), "characters", or "none"."""
    sizes = _sizes(words, rule)
    if next(grams_of(words, rule), None) is None:
        return "none"
    if min(sizes) < WORD:
        return "characters"
    return "words" if len(words) >= GRAM_WORDS else "short"


class Wanted:
    """Runs of words to be found in texts. The first three words of each nearly always decide."""

    def __init__(self, grams: Collection[Gram], rule: int = 2) -> None:
        self._grams, self._rule = frozenset(grams), rule
        lengths = defaultdict[Gram, set[int]](set)
        for gram in self._grams:
            lengths[gram[:3]].add(len(gram))
        self._lengths = {beginning: tuple(sorted(found)) for beginning, found in lengths.items()}
        self._longest = max(map(len, self._grams), default=GRAM_WORDS)

    def found_in(self, text: Text) -> Iterator[Gram]:
        """Those that the text holds."""
        lengths = self._lengths
        for words in self._words(text):
            beginnings = enumerate(zip(words, words[1:], words[2:], strict=False))
            for start, found in [(start, lengths[three]) for start, three in beginnings if three in lengths]:
                for length in found:
                    if (gram := tuple(words[start : start + length])) in self._grams:
                        yield gram

    def are_in(self, text: Text) -> bool:
        """Does the text hold one of them?"""
        return next(self.found_in(text), None) is not None

    def _words(self, text: Text) -> Iterator[list[str]]:
        """Its words, block by block; each block begins with the last words of the one before, so that no run is lost
        between them.
        """
        carried: list[str] = []
        tail = ""
        for block in blocks_of(text):
            block = tail + block
            cut = max(block.rfind(" "), block.rfind("\n")) if isinstance(text, LongText) else -1
            block, tail = (block[:cut], block[cut:]) if cut > 0 else (block, "")
            words = carried + words_of(block, self._rule)
            yield words
            carried = words[-(self._longest - 1) :]
        if tail:
            yield carried + words_of(tail, self._rule)


def blocks_of(text: Text) -> Iterator[str]:
    return text.blocks() if isinstance(text, LongText) else iter([text])
