"""A tokenizer.json as the `tokenizers` library reads it: read once, without truncation and padding, and with control
tokens that no text can make.

The library encodes an added token that is `special: true` as plain text. Nothing protects one with `special: false`,
nor one that is an entry of a Unigram, WordLevel or WordPiece vocabulary: there a page that quotes `</s>` would end its
document. Such a tokenizer encodes with a copy of itself in which no text can spell these entries; every other id stays.
"""

from __future__ import annotations

import ctypes
import functools
import json
import secrets
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np

from argonne import files
from argonne.errors import InputError, first_line
from argonne.layout import TOKENIZER_FILE, TURN_TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = "\U0010fffd\ue000"  # two characters that no tokenizer was trained on
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


class ParsedTokenizer:
    """What a tokenizer.json says, without truncation and padding; control tokens inside a text are plain text to it.

    `head`: all of it but the vocabulary and the merges, which as Python objects take more memory than the tokenizer
    itself.
    """

    def __init__(self, text: str, head: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.text, self.head, self.tokenizer = text, head, tokenizer
        self._lock = RLock()
        contents = [token["content"] for token in head.get("added_tokens", [])]
        self._only_nfc = head.get("normalizer") == {"type": "NFC"} and all(map(is_nfc, contents))

    def __reduce__(self) -> tuple[Any, ...]:
        return _parse, (self.text,)

    def specification(self) -> dict[str, Any]:
        """All of tokenizer.json, without truncation and padding; read anew at each call."""
        return {**json.loads(self.text), "truncation": None, "padding": None}

    @cached_property
    def fingerprint(self) -> str:
        return files.fingerprint(self.specification())

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as uint32, on the threads `tokenizers` is allowed.

        Texts that are in the normal form already, which Python tells at gigabytes a second, go past a normalizer that
        does nothing else: it takes a seventh of the work. A character that only one of the two knows is left as it is
        by both.
        """
        normal = [self._only_nfc and is_nfc(text) for text in texts]
        others = iter(self._ids([text for text, done in zip(texts, normal, strict=True) if not done]))
        if not any(normal):
            return list(others)
        with self._lock:
            normalizer = self.tokenizer.normalizer
            self.tokenizer.normalizer = None
            try:
                passed = iter(self._ids([text for text, done in zip(texts, normal, strict=True) if done]))
            finally:
                self.tokenizer.normalizer = normalizer
        return [next(passed if done else others) for done in normal]

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        with self._lock:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


def is_nfc(text: str) -> bool:
    return unicodedata.is_normalized("NFC", text)


def parse_tokenizer(text: str, folder: Path) -> ParsedTokenizer:
    """What the tokenizer.json of `folder` says. Raises InputError when the library cannot read it."""
    try:
        return _parse(text)
    except Exception as error:  # the library raises a plain Exception for any fault in the file
        raise InputError(
            f"{folder / TOKENIZER_FILE}: not a tokenizer the tokenizers library can read ({error}); restore the file, "
            "or name another folder"
        ) from None


@functools.lru_cache(maxsize=2)
def _parse(text: str) -> ParsedTokenizer:
    """150,000 entries take half a second, and several parts of one command ask for the same."""
    from tokenizers import Tokenizer

    tree = json.loads(text)
    model = {name: value for name, value in tree.get("model", {}).items() if name not in ("vocab", "merges")}
    head = {**tree, "model": model}
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    give_memory_back()  # reading takes twice what stays
    return ParsedTokenizer(text, head, tokenizer)


def control_ids(parsed: ParsedTokenizer, ends: Collection[int], roles: Collection[int]) -> frozenset[int]:
    """Ids that no text may produce. ends: of a document. roles: others that are named, such as padding.

    The unknown token is none, for any strange letter is one; nor is a role that is a single letter, which is text.
    """
    tokenizer = parsed.tokenizer
    added = {token_id: token.special for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    found = {token_id for token_id, special in added.items() if special}
    found |= {token_id for token_id in roles if token_id in added or len(str(tokenizer.id_to_token(token_id))) > 1}
    found |= {token_id for token in TURN_TOKENS if (token_id := tokenizer.token_to_id(token)) is not None}
    return frozenset((found - {_unknown_id(parsed)}) | {*ends})


def kept_apart(parsed: ParsedTokenizer, controls: Collection[int], folder: Path) -> ParsedTokenizer:
    """The tokenizer to which `controls` are no text: itself where it never makes one of a text, else a copy whose
    entries for them have names that nobody can write. Raises InputError where the library takes no such copy.
    """
    decoder = parsed.tokenizer.get_added_tokens_decoder()
    open_ = any(not decoder[token_id].special for token_id in controls if token_id in decoder)
    # Byte-pair merges rarely spell a control token; the others take any entry that they find in a text.
    if type(parsed.tokenizer.model).__name__ == "BPE" and not open_ and not made_of_text(parsed, controls):
        return parsed
    tree, unknown = parsed.specification(), _unknown_id(parsed)
    names = {parsed.tokenizer.id_to_token(token_id) for token_id in controls}
    renamed = _rename(tree["model"], {token_id for token_id in controls if token_id != unknown})
    # One that has no entry by its name any more would take a new id, and push those behind it on.
    tree["added_tokens"] = [
        {**token, "special": token["special"] or token["content"] in names}
        for token in tree.get("added_tokens", [])
        if token["content"] not in renamed
    ]
    tree["post_processor"] = None
    return parse_tokenizer(json.dumps(tree, ensure_ascii=False), folder)


def _rename(model: dict[str, Any], ids: Collection[int]) -> set[str]:
    """Give the entries with these ids names that no text holds; the names that they had."""
    entries = model["vocab"]
    if isinstance(entries, list):  # Unigram: pairs of a piece and its score, whose place is the id
        renamed = {entries[token_id][0] for token_id in ids if token_id < len(entries)}
        model["vocab"] = [[_hidden(piece) if piece in renamed else piece, score] for piece, score in entries]
        return renamed
    renamed = {entry for entry, token_id in entries.items() if token_id in ids}
    model["vocab"] = {_hidden(entry) if entry in renamed else entry: number for entry, number in entries.items()}
    if "merges" in model:
        pairs = (tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"])
        model["merges"] = [pair for pair in pairs if renamed.isdisjoint({*pair, "".join(pair)})]
    return renamed


@functools.cache
def _secret() -> str:
    """Of this process: no text of the world holds it, and no id depends on it."""
    return secrets.token_hex(32)


def _hidden(entry: str) -> str:
    return f"{_secret()}{entry}"


def _unknown_id(parsed: ParsedTokenizer) -> int | None:
    model = parsed.head["model"]
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    return parsed.tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None


def probes(parsed: ParsedTokenizer, token_id: int) -> Iterator[str]:
    """Texts that a careless tokenizer turns into this token: what it is written as, alone and among others, in capitals
    and in forms that normalisation takes back.
    """
    for name in sorted({str(parsed.tokenizer.id_to_token(token_id)), _decoded(parsed, token_id)}):
        forms = (name, f" {name} {name}", f"a{name}b", name * 2, name.upper(), name.lower(), name.translate(FULL_WIDTH))
        yield from (name, "\n".join(forms))


def _decoded(parsed: ParsedTokenizer, token_id: int) -> str:
    return str(parsed.tokenizer.decode([token_id], skip_special_tokens=False))


def made_of_text(parsed: ParsedTokenizer, ids: Collection[int], names: ParsedTokenizer | None = None) -> set[int]:
    """Those of `ids` that texts make; see `probes`. names: the tokenizer in which they have their names."""
    texts = [UNKNOWN, *(text for token_id in sorted(ids) for text in probes(names or parsed, token_id))]
    return {token for found in parsed.encode_batch(texts) for token in found.tolist()} & {*ids}


def cannot_be_text(parsed: ParsedTokenizer, whole: ParsedTokenizer, ids: Collection[int]) -> tuple[int, str] | None:
    """(id, why) of the first of `ids` that `parsed`, as `kept_apart` made it of `whole`, cannot tell from text."""
    added = whole.tokenizer.get_added_tokens_decoder()
    for token_id in sorted(ids):
        try:
            if made_of_text(parsed, [token_id], whole):
                return token_id, "a text can make it: any unknown word does, or the token's own letters"
            texts = [text for text in probes(whole, token_id) if text and token_id not in added]
            if not all(len(found) for found in parsed.encode_batch(texts)):
                return token_id, "it stands for a letter, which texts would lose"
        except Exception as error:  # the library raises a plain Exception where it has no token for unknown words
            return token_id, f"a text that quotes it cannot be encoded ({first_line(error)})"
    return None


def forget_parsed() -> None:
    """Free every tokenizer.json that was read: from here on other processes work."""
    _parse.cache_clear()
    give_memory_back()


def give_memory_back() -> None:
    """Return freed memory to the system where the C library can (glibc); elsewhere the process keeps it for itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
