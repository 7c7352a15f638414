"""A byte-level BPE tokenizer as the vocabulary of a GGUF file, and texts on which llama.cpp must give the same ids."""

from __future__ import annotations

import random
import re
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from argonne import layout
from argonne.errors import InputError
from argonne.tokens.tokenizer import SPLIT_PATTERN, TextTokenizer

INSTEAD = "export with --as hf or --as native, or use argonne generate, chat and serve"
NOT_NORMALISED = "llama.cpp does not bring texts to NFC, as this tokenizer does: give it texts in NFC."
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # of llama.cpp
# Names of which llama.cpp makes control tokens whatever a file says: quoted in a text they are plain text there.
TAKEN = tuple(f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep"))
# Of what random texts are made: where patterns differ (contractions, digits, white space, line ends), and scripts.
WORDS = (
    "Hello don't WE'LL I'M they've 's x1 3.14159 2026 １２ e.g. --> a/b naïve Zoë Ǆ e\u0301\u0323 Ελλάδα Привет שלום "
    "مرحبا नमस्ते สวัสดี 你好，世界 こんにちは 한국어 🙂 👩\u200d👩\u200d👧 🇪🇺 ½ ² Ⅷ ∑∞ €5 𝔘𝔫𝔦 \x1b[0m \x00 \ufeff"
)
BETWEEN = ("\n", "\r\n", "\t", "  ", "   \n ", "\u00a0", "\u3000", "!!!\n\n", "def f(x):\n    return x[1:]\n")


class GgufVocabulary(NamedTuple):
    """What llama.cpp's `gpt2` tokenizer is made of. pre: its name for the pattern. notes: what it does otherwise."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    notes: list[str]


def gguf_vocabulary(tokenizer: TextTokenizer, size: int) -> GgufVocabulary:
    """The tokenizer for a model of `size` ids. Raises InputError naming what llama.cpp cannot do as it does."""
    where, head, model = tokenizer.folder, tokenizer.head, tokenizer.specification()["model"]
    if model["type"] != "BPE":
        raise InputError(f"{where}: its tokenizer is {model['type']}; --as gguf writes byte-level BPE alone: {INSTEAD}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            raise _cannot(where, f"{name} = {model[name]!r}", "a BPE without")
    if head.get("normalizer") not in (None, {"type": "NFC"}):
        raise _cannot(where, f"the normalizer {head['normalizer']!r}", "none, or NFC")
    if tokenizer.vocab_size > size:
        raise InputError(
            f"{where}: its ids reach {tokenizer.vocab_size - 1:,}, the model has {size:,} rows; give the tokenizer "
            "that it was trained with"
        )
    names = {number: token for token, number in tokenizer.entries.items()}
    types = [NORMAL if number in names else UNUSED for number in range(size)]
    notes = [NOT_NORMALISED] if head.get("normalizer") else []
    for token in head.get("added_tokens", []):
        for name in ("lstrip", "rstrip", "single_word"):
            if token.get(name):
                raise _cannot(where, f"{name} of the token {token['content']!r}", "false")
        types[token["id"]] = CONTROL if token["special"] or token["content"] in TAKEN else USER_DEFINED
    if taken := taken_names(tokenizer):
        notes.append(f"Quoted in a text {', '.join(taken)} are plain text in llama.cpp, and tokens here.")
    return GgufVocabulary(
        pre=pre_tokenizer_name(head, where),
        tokens=[names.get(number, f"[PAD{number}]") for number in range(size)],
        types=types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        notes=notes,
    )


def taken_names(tokenizer: TextTokenizer) -> list[str]:
    """Of TAKEN those that a text of ours turns into tokens."""
    added = [token["content"] for token in tokenizer.head.get("added_tokens", []) if not token["special"]]
    return [name for name in added if name in TAKEN]


def _cannot(where: Path, found: str, expected: str) -> InputError:
    return InputError(f"{where}: its tokenizer has {found}, which llama.cpp cannot do; expected {expected}: {INSTEAD}")


def pre_tokenizer_name(head: dict[str, Any], where: Path) -> str:
    """llama.cpp's name for how texts are cut. Never `default`: it cuts otherwise than any of ours, without a word."""
    whole = head.get("pre_tokenizer") or {"type": None}
    parts = whole.get("pretokenizers", [whole])
    kinds, last = [part["type"] for part in parts], parts[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            split = parts[0]
            isolated = split["behavior"] == "Isolated" and not split.get("invert")
            if isolated and split["pattern"].get("Regex") == SPLIT_PATTERN:
                return "qwen2"
    raise _cannot(where, f"the pre-tokenizer {parts!r}", "the pattern of Qwen 2 (ours too) or of GPT-2, on bytes")


def chat_template(tokenizer: TextTokenizer) -> str | None:
    """The chat template beside a tokenizer, for readers that do not know transformers' `generation` blocks: these mark
    what is trained and print what is in them.
    """
    file = tokenizer.folder / layout.CHAT_TEMPLATE
    found = file.read_text(encoding="utf-8") if file.is_file() else tokenizer.config.get("chat_template")
    if not isinstance(found, str):
        return None
    begin = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", found)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", begin)


def sample_texts(tokenizer: TextTokenizer, count: int) -> list[str]:
    """Texts in NFC: half of them of WORDS, BETWEEN and the tokenizer's own added tokens, half of random entries."""
    draw = random.Random(0)
    added = [token["content"] for token in tokenizer.head.get("added_tokens", [])]
    pieces = [*WORDS.split(), *BETWEEN, *(name for name in added if name not in taken_names(tokenizer))]
    texts = []
    for number in range(count):
        if number % 2:
            text = tokenizer.decode([draw.randrange(tokenizer.vocab_size) for _ in range(12)])
        else:
            text = "".join(draw.choice(pieces) + draw.choice(("", " ", " ", "\n")) for _ in range(12))
        texts.append(unicodedata.normalize("NFC", text))
    return texts
