"""Who turns texts into ids: `tokenizers`, the reference, or gigatoken where it has shown the same ids.

Both take a batch of texts and give one flat array of ids with the length of each text, so that no Python list of ids lives long.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from argonne.errors import InputError
from argonne.prepare.newer_characters import any_newer
from argonne.tokens.tokenizer import TextTokenizer, forget_parsed, give_memory_back

PIECE_BYTES = 1 << 20
WHOLE_WITHIN_BYTES = 16 << 20
# A single line feed between a visible character and an ASCII letter: no pre-token of the known families crosses it, nor does normalisation.
CUT = re.compile(rb"[!-~]\n(?=[A-Za-z])")
CONTEXT_BYTES = 256

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


class Encoder(Protocol):
    """Texts to ids: (all ids one after the other as uint32, the number of ids of each text as int64)."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...


class ReferenceEncoder:
    """`tokenizers`, on the threads it is allowed."""

    name = "tokenizers"

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        arrays = self._tokenizer.encode_batch(texts)
        return joined(arrays), np.array([len(array) for array in arrays], dtype=np.int64)


class FastEncoder:
    """gigatoken, built from the same tokenizer.json without its control tokens, so that these are plain text to it too.

    A batch with a character on which its Unicode tables and those of `tokenizers` disagree is left to the reference.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = _gigatoken(tokenizer.text_json)
        self._reference = ReferenceEncoder(tokenizer)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        import awkward

        if not texts:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        if any_newer(texts):
            return self._reference.encode(texts)
        found = self._tokenizer.encode_batch(list(texts))
        return np.asarray(awkward.flatten(found), dtype=np.uint32), np.asarray(awkward.num(found), dtype=np.int64)


@functools.lru_cache(maxsize=1)
def _gigatoken(text_json: str) -> Any:
    """Its tables take a second to build, and the identity check is followed by the work."""
    import gigatoken

    built = gigatoken.Tokenizer.from_json(text_json)
    give_memory_back()
    return built


def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.uint32)


@dataclass(frozen=True)
class Choice:
    """The encoder that will be used and, in one line, why."""

    encoder: Encoder
    reason: str


def choose(tokenizer: TextTokenizer, asked: str, texts: Sequence[str]) -> Choice:
    """gigatoken when it is installed and gives the reference's ids on the hard probes and on `texts` (the first documents); else the reference.

    Raises InputError when gigatoken was asked for by name and cannot be used.
    """
    if asked == "tokenizers":
        return Choice(ReferenceEncoder(tokenizer), "encoder: tokenizers, as asked")
    reason = _fast_fault(tokenizer, texts)
    if isinstance(reason, FastEncoder):
        return Choice(reason, f"encoder: gigatoken, same ids as tokenizers on {len(HARD_PROBES) + len(texts)} probes")
    if asked == "gigatoken":
        raise InputError(f"--encoder gigatoken: {reason}; use --encoder auto or tokenizers")
    return Choice(ReferenceEncoder(tokenizer), f"encoder: tokenizers ({reason})")


def _fast_fault(tokenizer: TextTokenizer, texts: Sequence[str]) -> FastEncoder | str:
    """The fast encoder, or why it cannot be used."""
    try:
        fast = FastEncoder(tokenizer)
    except ImportError:
        return "gigatoken is not installed: pip install 'argonne[fast]' makes this several times faster"
    except Exception as error:  # a tokenizer of a kind that gigatoken does not know; its errors share no class
        return f"gigatoken cannot read this tokenizer: {str(error).splitlines()[0]}"
    reference = ReferenceEncoder(tokenizer)
    probes = [*HARD_PROBES, *(added["content"] for added in tokenizer.head.get("added_tokens", [])), *texts]
    expected, found = reference.encode(probes), fast.encode(probes)
    differing = np.nonzero(expected[1] != found[1])[0]
    if len(differing):
        return f"gigatoken gives other ids for {probes[int(differing[0])][:40]!r}"
    if not np.array_equal(expected[0], found[0]):
        place = int(np.nonzero(expected[0] != found[0])[0][0])
        text = probes[int(np.searchsorted(np.cumsum(expected[1]), place, side="right"))]
        return f"gigatoken gives other ids for {text[:40]!r}"
    return fast


def pieces_of(text: bytes | memoryview, encoder: Encoder) -> Iterator[str]:
    """A long UTF-8 text in pieces of about 1 MB whose ids, one after the other, are the ids of the whole.

    It is cut only where the encoder gives the same ids for the surroundings in one and in two pieces. Where 16 MB hold no such place, the rest is
    one piece. Raises UnicodeDecodeError when the text is not UTF-8.
    """
    view, start = memoryview(text), 0
    while len(view) - start > PIECE_BYTES:
        cut = _safe_cut(view, start, encoder)
        if cut is None:
            break
        yield bytes(view[start:cut]).decode()
        start = cut
    yield bytes(view[start:]).decode()


def _safe_cut(view: memoryview, start: int, encoder: Encoder) -> int | None:
    low = start + PIECE_BYTES // 2
    for match in CUT.finditer(view[low : min(start + WHOLE_WITHIN_BYTES, len(view) - 1)]):
        cut = low + match.end()
        before, after = _context(view, max(start, cut - CONTEXT_BYTES), cut), _context(view, cut, cut + CONTEXT_BYTES)
        whole, parts = encoder.encode([before + after]), encoder.encode([before, after])
        if np.array_equal(whole[0], parts[0]):
            return cut
    return None


def _context(view: memoryview, start: int, stop: int) -> str:
    """The text of a few bytes; a character cut at the far end does not matter, both encodings see the same."""
    return bytes(view[start:stop]).decode(errors="ignore")


def load(name: str, tokenizer: TextTokenizer) -> Any:
    """The encoder that `choose` settled on, in a worker."""
    return FastEncoder(tokenizer) if name == "gigatoken" else ReferenceEncoder(tokenizer)


def forget() -> None:
    """Free what this process keeps of encoders and tokenizers; it will read them again if it needs them."""
    _gigatoken.cache_clear()
    forget_parsed()
