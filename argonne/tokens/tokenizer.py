"""Text to token ids and back: one loader for every tokenizer file, and byte-level BPE training.

`tokenizer.json` as the `tokenizers` library reads it is the truth. Nothing is downloaded and no remote code runs.
Control tokens that appear inside a text are encoded as plain text, whatever kind of tokenizer it is: a web page that
quotes `<|endoftext|>` does not end a document (argonne.tokens.parsed).
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from argonne import files
from argonne.errors import InputError
from argonne.layout import (
    CONTENT_TOKENS,
    MERGES,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    TURN_TOKENS,
    VOCABULARY,
    tokenizer_of,
)
from argonne.tokens.parsed import (
    ParsedTokenizer,
    cannot_be_text,
    control_ids,
    kept_apart,
    parse_tokenizer,
    probes,
)

ADDED_TOKENS = ("library", "plain")
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
# A chat model's configuration may name one of these as eos_token: it ends a turn, not a document.
TURN_ENDS = (TURN_TOKENS[1], "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end|>")
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
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

    eos_id: what ends a document. named_end_id: the eos_token of its configuration, which may end a turn instead (Qwen).
    controls: ids that no text produces.
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
        # Ids may have holes: what is indexed by id reaches up to the highest.
        self.vocab_size: int = 1 + max(self._whole.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_id, self.named_end_id, self.pad_id = (
            self._named(role) for role in ("bos_token", "eos_token", "pad_token")
        )
        named = None if self.named_end_id is None else self._whole.id_to_token(self.named_end_id)
        end, self._why_end = document_end(named, self._whole.token_to_id)
        self.eos_id: int | None = None if end is None else self._whole.token_to_id(end)
        roles = {token_id for token_id in (self.bos_id, self.named_end_id, self.pad_id) if token_id is not None}
        self.controls = control_ids(parsed, set() if self.eos_id is None else {self.eos_id}, roles)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Where generation ends: the end of a document, and the eos_token that the configuration names where it is
        another.
        """
        return tuple(dict.fromkeys(end for end in (self.eos_id, self.named_end_id) if end is not None))

    def ending_as(self, recorded: int | Sequence[int] | None) -> TextTokenizer:
        """Itself, ending documents as a token set, or a model with these ends, was made. Earlier sets of a tokenizer
        whose eos_token ends a turn were made with that.
        """
        ends = [recorded] if isinstance(recorded, int) else list(recorded or ())
        if ends and self.eos_id not in ends:
            self.eos_id, self._why_end = ends[-1], "as it was made"
            self.controls |= {ends[-1]}
        return self

    @property
    def end_told(self) -> str:
        """The line for a person: what ends a document, and why this where others could."""
        if self.eos_id is None:
            return "documents have no end"
        why = f": {self._why_end}" if self._why_end else ""
        return f"documents end with {self._whole.id_to_token(self.eos_id)!r} (id {self.eos_id}){why}"

    @cached_property
    def _apart(self) -> ParsedTokenizer:
        """The tokenizer to which control tokens are text."""
        plain = {*self._whole.get_added_tokens_decoder()} if self.added_tokens == "plain" else frozenset[int]()
        return kept_apart(self._parsed, self.controls | plain, self.folder)

    @cached_property
    def _encoder(self) -> ParsedTokenizer:
        return self._apart if self.added_tokens == "library" else parse_tokenizer(self.text_json, self.folder)

    def probes(self) -> list[str]:
        """Texts that could be taken for control tokens."""
        return [text for token_id in sorted(self.controls) for text in probes(self._parsed, token_id)]

    def check_text(self, ids: Collection[int]) -> None:
        """Raise InputError naming the first of these tokens that a text could make."""
        if (found := cannot_be_text(self._encoder, self._parsed, ids)) is not None:
            raise InputError(
                f"tokenizer {self.folder}: {self._whole.id_to_token(found[0])!r} (id {found[0]}) is no word, and "
                f"{found[1]}; name another token for it in {TOKENIZER_CONFIG}, or use another tokenizer"
            )

    @property
    def text_json(self) -> str:
        """The tokenizer.json that sees no control token in a text: what an encoder without `encode_special_tokens` must
        be built from.
        """
        kept = [
            token
            for token in self._apart.head.get("added_tokens", [])
            if self.added_tokens == "library" and not token["special"]
        ]
        return json.dumps(
            {**self._apart.specification(), "added_tokens": kept, "post_processor": None}, ensure_ascii=False
        )

    @property
    def has_pre_tokens(self) -> bool:
        """Is a text cut into pre-tokens before merging? Where it is not (Llama), ids may depend on the whole text."""
        return '"ByteLevel"' in json.dumps(self.head.get("pre_tokenizer"))

    def _named(self, role: str) -> int | None:
        value = self.config.get(role)
        name = value.get("content") if isinstance(value, dict) else value
        if name is None or (token_id := self._whole.token_to_id(name)) is not None:
            return None if name is None else token_id
        raise InputError(
            f"{self.folder}: {TOKENIZER_CONFIG} names the {role} {name!r}, which is not in {TOKENIZER_FILE}; mend one "
            "of them"
        )

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
        sizes[list(self.controls)] = 0
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
    config = named_tokens(folder)
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


def named_tokens(folder: Path) -> dict[str, Any]:
    """The tokenizer_config.json of a folder, with the roles that only its special_tokens_map.json names. Raises
    InputError where one of them is no object.
    """
    found: list[dict[str, Any]] = []
    for path in (folder / TOKENIZER_CONFIG, folder / SPECIAL_TOKENS_MAP):
        tree = files.read_json(path) if path.is_file() else {}
        if not isinstance(tree, dict):
            raise InputError(f"{path}: found a {type(tree).__name__}, expected an object of settings; restore the file")
        found.append(tree)
    config, others = found
    return config | {role: others[role] for role in ROLES if others.get(role) and config.get(role) is None}


def document_end(named: str | None, known: Callable[[str], int | None]) -> tuple[str | None, str]:
    """(the token that ends a document, why it is this one where others could). named: the configuration's eos_token.
    known: the id of a token. None where nothing is named and no usual one is known.
    """
    usual = [token for token in END_OF_TEXT if known(token) is not None]
    chosen = next(iter(usual), None) if named is None or (named in TURN_ENDS and usual) else named
    others = ", ".join(repr(token) for token in usual if token != chosen)
    why = "no eos_token is named" if named is None else "it is the eos_token that is named"
    if named not in (None, chosen):
        return chosen, f"the eos_token that is named, {named!r}, ends a turn"
    return chosen, f"{why}; {others} could too" if others else ""


def _converted(folder: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(tokenizer.json, configuration) for a folder that has only a vocabulary and merges."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    if config.get("tokenizer_class"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    else:
        tokenizer = GPT2Tokenizer.from_pretrained(str(folder), local_files_only=True)
    names = {role: str(getattr(tokenizer, role)) for role in ROLES if getattr(tokenizer, role)}
    return tokenizer.backend_tokenizer.to_str(), {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}


def special_tokens(vocab_size: int, *, bare: bool) -> tuple[str, ...]:
    """Those of a tokenizer that is trained here. Raises InputError when `vocab_size` leaves no room for a merge."""
    special = BARE_TOKENS if bare else (END_OF_TEXT[0], "<|pad|>", *TURN_TOKENS, *CONTENT_TOKENS, *SPARE_TOKENS)
    smallest = 256 + len(special) + 1
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size: found {vocab_size}, expected at least {smallest} (256 bytes, {len(special)} special tokens, "
            "one merge)"
        )
    return special


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path, *, bare: bool = False) -> Path:
    """Train byte-level BPE on `texts` into the folder `out` and return it.

    `vocab_size` counts everything: 256 bytes, merges, end of text, pad, the turn, think and tool tokens and 16 spare
    ids; `bare` has the five special tokens of Argonne 1.x instead. Raises InputError when `vocab_size` leaves no room
    for a merge or `texts` is empty.
    """
    from tokenizers import Regex as TokenizersRegex
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = special_tokens(vocab_size, bare=bare)
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
