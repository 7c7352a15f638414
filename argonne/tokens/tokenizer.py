"""Text to token ids and back: one loader for every tokenizer file, and byte-level BPE training.

`tokenizer.json` as the `tokenizers` library reads it is the truth. Nothing is downloaded and no remote code runs.
Control tokens (`special: true`) that appear inside a text are encoded as plain text: a web page that quotes
`<|endoftext|>` does not end a document.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np

from argonne import files
from argonne.errors import InputError
from argonne.layout import (
    CONTENT_TOKENS,
    MERGES,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    TURN_TOKENS,
    VOCABULARY,
    tokenizer_of,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ADDED_TOKENS = ("library", "plain")
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")
SPARE_TOKENS = tuple(f"<|spare_{number}|>" for number in range(16))
BARE_TOKENS = ("<|start_of_text|>", "<pad>", "<|end_of_text|>", "<unk>", "<mask>")
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class AddedTokens:
    """Tokens that were put behind the entries of a tokenizer. base, base_folder: that tokenizer. ids: those of `names`,
    in order.
    """

    base: str
    base_folder: Path
    names: tuple[str, ...]
    ids: range


class TextTokenizer:
    """A loaded tokenizer. `added_tokens = "plain"` makes every added token plain text inside a document, not only the
    control tokens. `added`: what this run put behind its entries, None where it took the tokenizer as it was.
    """

    added: AddedTokens | None = None

    def __init__(
        self, parsed: ParsedTokenizer, config: dict[str, Any], folder: Path, added_tokens: str = "library"
    ) -> None:
        if added_tokens not in ADDED_TOKENS:
            raise InputError(f"added_tokens: found {added_tokens!r}, expected {' or '.join(map(repr, ADDED_TOKENS))}")
        self._parsed, self.config = parsed, config
        self.head = parsed.head
        self.folder = folder
        self.added_tokens = added_tokens
        self._whole = parsed.tokenizer
        self._encoder = parsed if added_tokens == "library" else parse_tokenizer(self.text_json, folder)
        # Ids may have holes: what is indexed by id reaches up to the highest.
        self.vocab_size: int = 1 + max(self._whole.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_id = self._named("bos_token", ())
        self.eos_id = self._named("eos_token", END_OF_TEXT)
        self.pad_id = self._named("pad_token", ())

    @property
    def text_json(self) -> str:
        """The tokenizer.json that sees no control token in a text: what an encoder without `encode_special_tokens` must
        be built from.
        """
        kept = [
            token
            for token in self.head.get("added_tokens", [])
            if self.added_tokens == "library" and not token["special"]
        ]
        return json.dumps(
            {**self._parsed.specification(), "added_tokens": kept, "post_processor": None}, ensure_ascii=False
        )

    @property
    def has_pre_tokens(self) -> bool:
        """Is a text cut into pre-tokens before merging? Where it is not (Llama), ids may depend on the whole text."""
        return '"ByteLevel"' in json.dumps(self.head.get("pre_tokenizer"))

    def _named(self, role: str, candidates: Sequence[str]) -> int | None:
        value = self.config.get(role)
        content = value.get("content") if isinstance(value, dict) else value
        for name in (content, *candidates):
            if name is not None and (token_id := self._whole.token_to_id(name)) is not None:
                return int(token_id)
            if name is not None and name == content:
                raise InputError(
                    f"{self.folder}: {TOKENIZER_CONFIG} names the {role} {name!r}, which is not in {TOKENIZER_FILE}; "
                    "mend one of them"
                )
        return None

    def specification(self) -> dict[str, Any]:
        """All of tokenizer.json, without truncation and padding; read anew at each call."""
        return self._parsed.specification()

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical tokenizer.json: equal ids for equal text, wherever the folder lies."""
        return self._parsed.fingerprint

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without BOS or EOS."""
        return self._encoder.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as uint32, on the threads `tokenizers` is allowed."""
        return self._encoder.encode_batch(texts)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        return str(self._whole.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        return self._whole.token_to_id(token)

    @property
    def entries(self) -> dict[str, int]:
        """Every token, added ones too, and its id."""
        return dict(self._whole.get_vocab(with_added_tokens=True))

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int32: bytes of text that each id stands for; control tokens stand for none.
        For bits per byte.
        """
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        byte_level = "ByteLevel" in json.dumps([self.head.get("pre_tokenizer"), self.head.get("decoder")])
        for token, token_id in self._whole.get_vocab(with_added_tokens=False).items():
            if byte_level:
                sizes[token_id] = len(token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                sizes[token_id] = 1
            else:
                sizes[token_id] = len(token.replace("▁", " ").encode())
        for token_id, added in self._whole.get_added_tokens_decoder().items():
            sizes[token_id] = 0 if added.special else len(added.content.encode())
        return sizes

    def save(self, folder: Path) -> None:
        """Write a complete Hugging Face tokenizer folder: tokenizer.json, tokenizer_config.json and what came with
        them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        original = self.folder / TOKENIZER_FILE
        if original.is_file():
            shutil.copyfile(original, folder / TOKENIZER_FILE)
        else:
            (folder / TOKENIZER_FILE).write_text(json.dumps(self._parsed.specification(), ensure_ascii=False))
        for name in TOKENIZER_FILES:
            if name != TOKENIZER_FILE and (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        if not (folder / TOKENIZER_CONFIG).exists():
            files.write_json(folder / TOKENIZER_CONFIG, self.config)


@functools.cache
def byte_letters() -> dict[str, int]:
    """The byte behind each letter with which byte-level BPE writes its tokens: most stand for themselves, the others
    for letters from 256 on.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    own = [letter for letter in letters if ord(letter) < 256]
    others = sorted({*range(256)} - {ord(letter) for letter in own})
    return {**{letter: ord(letter) for letter in own}, **dict(zip(letters[len(own) :], others, strict=True))}


def load_tokenizer(folder: Path | str, added_tokens: str = "library") -> TextTokenizer:
    """The tokenizer of a folder with tokenizer.json, or with vocab.json and merges.txt (converted through
    transformers).

    Raises InputError naming the folder and the files that are missing or cannot be read.
    """
    folder = Path(folder)
    if folder.is_file() and folder.name == TOKENIZER_FILE:
        folder = folder.parent
    folder = tokenizer_of(folder) or folder  # of a token set or a model too
    if not folder.is_dir():
        raise InputError(f"tokenizer {folder}: no such folder; give a local folder that holds {TOKENIZER_FILE}")
    config = files.read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    if not isinstance(config, dict):
        raise InputError(
            f"{folder / TOKENIZER_CONFIG}: found a {type(config).__name__}, expected an object of settings; restore "
            "the file"
        )
    if (folder / TOKENIZER_FILE).is_file():
        text = (folder / TOKENIZER_FILE).read_bytes().decode(errors="replace")
    elif (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
        try:
            text, config = _converted(folder, config)
        except Exception as error:  # transformers and tokenizers raise what they like for a damaged file
            raise InputError(
                f"{folder}: its vocab.json and merges.txt cannot be read ({error}); restore them, or name another "
                "folder"
            ) from None
    else:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise InputError(f"tokenizer {folder}: found {found}; expected {TOKENIZER_FILE}, or vocab.json with merges.txt")
    return TextTokenizer(parse_tokenizer(text, folder), config, folder, added_tokens)


def _converted(folder: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(tokenizer.json, configuration) for a folder that has only a vocabulary and merges."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    if config.get("tokenizer_class"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    else:
        tokenizer = GPT2Tokenizer.from_pretrained(str(folder), local_files_only=True)
    roles = ("bos_token", "eos_token", "pad_token", "unk_token")
    names = {role: str(getattr(tokenizer, role)) for role in roles if getattr(tokenizer, role)}
    return tokenizer.backend_tokenizer.to_str(), {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path, *, bare: bool = False) -> Path:
    """Train byte-level BPE on `texts` into the folder `out` and return it.

    `vocab_size` counts everything: 256 bytes, merges, end of text, pad, the turn, think and tool tokens and 16 spare
    ids; `bare` has the five special tokens of Argonne 1.x instead. Raises InputError when `vocab_size` leaves no room
    for a merge or `texts` is empty.
    """
    from tokenizers import Regex as TokenizersRegex
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = BARE_TOKENS if bare else (END_OF_TEXT[0], "<|pad|>", *TURN_TOKENS, *CONTENT_TOKENS, *SPARE_TOKENS)
    smallest = 256 + len(special) + 1
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size: found {vocab_size}, expected at least {smallest} (256 bytes, {len(special)} special tokens, "
            "one merge)"
        )
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bare)
    split = pre_tokenizers.Split(TokenizersRegex(SPLIT_PATTERN), "isolated")
    tokenizer.pre_tokenizer = byte_level if bare else pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(special),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    texts = iter(texts)
    if (first := next(texts, None)) is None:
        raise InputError("tokenizer training: no text was found in the input")
    tokenizer.train_from_iterator(itertools.chain([first], texts), trainer)
    specification = json.loads(tokenizer.to_str())
    for token in specification["added_tokens"]:
        token["special"] = token["content"] not in CONTENT_TOKENS
    if bare:
        names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), BARE_TOKENS, strict=True))
    else:
        names = {"eos_token": END_OF_TEXT[0], "pad_token": "<|pad|>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
    }
    with files.atomic_directory(out) as temporary:
        (temporary / TOKENIZER_FILE).write_text(json.dumps(specification, ensure_ascii=False))
        (temporary / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return out


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

    head = {name: value for name, value in json.loads(text).items() if name != "model"}
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    give_memory_back()  # reading takes twice what stays
    return ParsedTokenizer(text, head, tokenizer)


def forget_parsed() -> None:
    """Free every tokenizer.json that was read: from here on other processes work."""
    _parse.cache_clear()
    give_memory_back()


def give_memory_back() -> None:
    """Return freed memory to the system where the C library can (glibc); elsewhere the process keeps it for itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
