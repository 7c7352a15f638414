"""Who turns texts into ids: `tokenizers`, the reference, or gigatoken where it has shown the same ids.

Both take a batch of texts and give one flat array of ids with the length of each text, so that no Python list of ids
lives long.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from argonne.errors import InputError, first_line
from argonne.prepare.texts import Bytes
from argonne.tokens.parsed import forget_parsed, give_memory_back
from argonne.tokens.tokenizer import TextTokenizer

PIECE_BYTES = 1 << 20
WHOLE_WITHIN_BYTES = 16 << 20
# A single line feed between a visible character and an ASCII letter: no pre-token of the known families crosses it, nor
# does normalisation.
CUT = re.compile(rb"[!-~]\n(?=[A-Za-z])")
CONTEXT_BYTES = 256

# Characters on whose class or combining order gigatoken and `tokenizers` disagree, because their Unicode tables are of
# different years. gigatoken knows Unicode 17, `tokenizers` older tables: NFC then orders marks otherwise, and a letter
# is cut off as a symbol. The ranges were found by encoding every code point in three surroundings with Qwen's tokenizer
# (the campaign test in tests/prepare/test_encoders.py does it again).
NEWER_RANGES = """
7fd 88f 897-89f 8ca-8d3 9fe c3c c5c cdc d3b-d3c eba 1715 1abf-1aff 1df6-1dfa a7ce-a7cf a7d2 a7d4 a7f1 a82c 10940-1095f
10d24-10d27 10d69-10d6d 10eab-10eac 10ec5-10ec7 10efa-10eff 10f46-10f50 10f82-10f85 11070 1133b 113ce-113d0 1145e
11839-1183a 1193d-1193e 11943 119e0 11a34 11a47 11a99 11d42-11d45 11d97 11db0-11def 11f41-11f42 1612f 16ea0-16edf
16ff0-16ff6 187f8-187ff 18d09-18d1e 18d80-18dff 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef 1e5ee-1e5ef
1e6c0-1e6ff 2b73a-2b73f 2cea2-2cead 2ebe0-2ee5d 31350-3347f
"""
LOWEST_NEWER = 0x7FD

HARD_PROBES = (
    "",
    " ",
    "\n\n \t x",
    "a\u0301 cafe\u0301 caf\u00e9 \u212b \u00c5 \ufb01 \u1e9b\u0323",
    "你好，世界！ こんにちは 한국어 \u1112\u1161\u11ab",
    "😀👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f1e9\U0001f1ea",
    "\u0000 nul \u0007 bell \u200b zero width \u00a0 hard \u2028 line \ufeff bom",
    "1234567890 3.14159 १२३ ٤٥٦ Ⅷ ½",
    "don't DON'T it's IT'S we'LL 'tis",
    "def f(x):\n\treturn  x**2   # done\r\n\r\n",
    "<|endoftext|> <|im_start|>user<|im_end|> <think>so</think> <tool_call>{}</tool_call> </s> <s> <pad>",
    "नमस्ते दुनिया สวัสดี مرحبا بالعالم שלום",
    "x" * 300,
    " " * 70 + "end",
    "ǅ ß ẞ İ ı \u0345",
)


class ReferenceEncoder:
    """`tokenizers`, on the threads it is allowed."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(all ids one after the other as uint32, the number of ids of each text as int64)."""
        arrays = self._tokenizer.encode_batch(texts)
        lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        return self._without_end(np.concatenate([np.zeros(0, np.uint32), *arrays]), lengths, texts)

    def _without_end(self, ids: np.ndarray, lengths: np.ndarray, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, lengths). Raises InputError where a text came out as the end of a document: the last guard behind what
        the tokenizer promises.
        """
        end = self._tokenizer.eos_id
        if end is not None and (ids == end).any():
            number = int(np.searchsorted(np.cumsum(lengths), int((ids == end).argmax()), side="right"))
            raise InputError(
                f"tokenizer {self._tokenizer.folder}: a text made {self._tokenizer.decode([end])!r} (id {end}), with "
                f"which documents end: the one that begins {texts[number][:40]!r}; use another tokenizer, or take that "
                "text out"
            )
        return ids, lengths


class FastEncoder(ReferenceEncoder):
    """gigatoken, built from the same tokenizer.json without its control tokens, so that these are plain text to it too.

    A batch with a character on which its Unicode tables and those of `tokenizers` disagree is left to the reference.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        super().__init__(tokenizer)
        self._fast = _gigatoken(tokenizer.text_json)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        import awkward

        if not texts:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        if any_newer(texts):
            return super().encode(texts)
        found = self._fast.encode_batch(list(texts))
        ids, lengths = np.asarray(awkward.flatten(found), np.uint32), np.asarray(awkward.num(found), np.int64)
        return self._without_end(ids, lengths, texts)


@functools.lru_cache(maxsize=1)
def _gigatoken(text_json: str) -> Any:
    """Its tables take a second to build, and the identity check is followed by the work."""
    import gigatoken

    built = gigatoken.Tokenizer.from_json(text_json)
    give_memory_back()
    return built


@functools.cache
def _newer() -> np.ndarray:
    """(0x110000,) bool: the characters of `NEWER_RANGES`."""
    table = np.zeros(0x110000, dtype=bool)
    for part in NEWER_RANGES.split():
        first, _, last = part.partition("-")
        table[int(first, 16) : int(last or first, 16) + 1] = True
    return table


def any_newer(texts: Sequence[str]) -> bool:
    """Does any of the texts hold such a character? About two nanoseconds a character of a text that is not ASCII, a
    megabyte at a time.
    """
    whole = "".join(text for text in texts if not text.isascii())
    for start in range(0, len(whole), PIECE_BYTES):
        codes = np.frombuffer(whole[start : start + PIECE_BYTES].encode("utf-32-le"), dtype="<u4")
        if _newer()[codes[codes >= LOWEST_NEWER]].any():
            return True
    return False


def choose(tokenizer: TextTokenizer, asked: str, texts: Sequence[str]) -> tuple[str, str]:
    """(encoder, why, in one line): gigatoken when it is installed and gives the reference's ids on the hard probes and
    on `texts` (the first documents); else the reference. Raises InputError when gigatoken was asked for by name and
    cannot be used."""
    if asked == "tokenizers":
        return "tokenizers", "encoder: tokenizers, as asked"
    fault = _fast_fault(tokenizer, texts)
    if fault is None:
        return "gigatoken", f"encoder: gigatoken, same ids as tokenizers on {len(HARD_PROBES) + len(texts)} probes"
    if asked == "gigatoken":
        raise InputError(f"--encoder gigatoken: {fault}; use --encoder auto or tokenizers")
    return "tokenizers", f"encoder: tokenizers ({fault})"


def _fast_fault(tokenizer: TextTokenizer, texts: Sequence[str]) -> str | None:
    """Why the fast encoder cannot be used."""
    try:
        fast = FastEncoder(tokenizer)
    except ImportError:
        return "gigatoken is not installed: pip install 'argonne[fast]' makes this several times faster"
    except Exception as error:  # a tokenizer of a kind that gigatoken does not know; its errors share no class
        return f"gigatoken cannot read this tokenizer: {first_line(error)}"
    reference = ReferenceEncoder(tokenizer)
    added = (added["content"] for added in tokenizer.head.get("added_tokens", []))
    probes = [*HARD_PROBES, *added, *tokenizer.probes(), *texts]
    expected = reference.encode(probes)
    try:
        found = fast.encode(probes)
    except InputError:
        return "gigatoken takes a control token in a text for the token"
    differing = np.nonzero(expected[1] != found[1])[0]
    if not len(differing):
        differing = np.searchsorted(np.cumsum(expected[1]), np.nonzero(expected[0] != found[0])[0], side="right")
    return f"gigatoken gives other ids for {probes[int(differing[0])][:40]!r}" if len(differing) else None


def pieces_of(text: bytes | Bytes, encoder: ReferenceEncoder) -> Iterator[str]:
    """A long UTF-8 text in pieces of about 1 MB whose ids, one after the other, are the ids of the whole.

    It is cut only where the encoder gives the same ids for the surroundings in one and in two pieces. Where 16 MB hold
    no such place, the rest is one piece. Raises UnicodeDecodeError when the text is not UTF-8.
    """
    view, start = memoryview(text) if isinstance(text, bytes) else text, 0
    while len(view) - start > PIECE_BYTES:
        cut = _safe_cut(view, start, encoder)
        if cut is None:
            break
        yield bytes(view[start:cut]).decode()
        start = cut
    yield bytes(view[start:]).decode()


def _safe_cut(view: Bytes, start: int, encoder: ReferenceEncoder) -> int | None:
    end = min(start + WHOLE_WITHIN_BYTES, len(view) - 1)
    for low in range(start + PIECE_BYTES // 2, end, PIECE_BYTES):
        for match in CUT.finditer(view[low : min(low + PIECE_BYTES + 2, end)]):  # it looks at three bytes
            cut = low + match.end()
            # A character cut at the far end does not matter, both encodings see the same.
            sides = view[max(start, cut - CONTEXT_BYTES) : cut], view[cut : cut + CONTEXT_BYTES]
            before, after = (bytes(side).decode(errors="ignore") for side in sides)
            whole, parts = encoder.encode([before + after]), encoder.encode([before, after])
            if np.array_equal(whole[0], parts[0]):
                return cut
    return None


def load(name: str, tokenizer: TextTokenizer) -> ReferenceEncoder:
    """The encoder that `choose` settled on, in a worker."""
    return FastEncoder(tokenizer) if name == "gigatoken" else ReferenceEncoder(tokenizer)


def forget() -> None:
    """Free what this process keeps of encoders and tokenizers; it will read them again if it needs them."""
    _gigatoken.cache_clear()
    forget_parsed()
