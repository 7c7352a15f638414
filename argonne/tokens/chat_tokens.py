"""The turn, think and tool tokens for a tokenizer that lacks them: behind its entries, each of which keeps its id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argonne import files
from argonne.errors import InputError
from argonne.layout import CONTENT_TOKENS, TOKENIZER_CONFIG, TOKENIZER_FILE, TURN_TOKENS
from argonne.tokens.tokenizer import AddedTokens, TextTokenizer, load_tokenizer

CHAT_TOKENS = (*TURN_TOKENS, *CONTENT_TOKENS)


def kept_chat_tokens(tokenizer: TextTokenizer, folder: Path, tokens: Sequence[str] = CHAT_TOKENS) -> TextTokenizer:
    """The tokenizer with `tokens` out of `folder`, into which it is written once: several processes may ask for it.
    What is new stands in its `added`.

    New ids follow the highest, every other stays. Turn tokens are control tokens ("special": true) afterwards, the
    others are not.

    What lies there is compared with what would be written, so that every id of the tokenizer that it extends means what
    it meant. Raises InputError where the folder is damaged, or the library gives other ids; one that extends another
    tokenizer is replaced.
    """
    specification, added = _extended(tokenizer, tokens)
    with files.one_at_a_time(folder.with_name(f".{folder.name}.lock")):
        if folder.exists() and (problems := files.verify_directory(folder)):
            raise InputError(
                f"{folder}: {problems[0]}; remove the folder: the next start makes it again, of {tokenizer.folder}"
            )
        made = load_tokenizer(folder, tokenizer.added_tokens) if folder.exists() else None
        if made is None or made.fingerprint != files.fingerprint(specification):
            made = _write(tokenizer, specification, added, folder, replace=True)
    ids = range(tokenizer.vocab_size, tokenizer.vocab_size + len(added))
    made.added = AddedTokens(tokenizer.fingerprint, tokenizer.folder, tuple(added), ids)
    return made


def _extended(tokenizer: TextTokenizer, tokens: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(the tokenizer.json with `tokens`, those that are new to it)."""
    specification = tokenizer.specification()
    entries = {entry["content"]: entry for entry in specification.setdefault("added_tokens", [])}
    added = [token for token in tokens if tokenizer.token_to_id(token) is None]
    for token in tokens:
        known = tokenizer.token_to_id(token)
        token_id = tokenizer.vocab_size + added.index(token) if known is None else known
        entry = {"id": token_id, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        entry = entries.setdefault(token, {**entry, "normalized": False, "special": token in TURN_TOKENS})
        entry["special"] = entry["special"] or token in TURN_TOKENS
    specification["added_tokens"] = sorted(entries.values(), key=lambda entry: int(entry["id"]))
    return specification, added


def _write(
    tokenizer: TextTokenizer, specification: dict[str, Any], added: list[str], out: Path, *, replace: bool = False
) -> TextTokenizer:
    config = {name: value for name, value in tokenizer.config.items() if name != "added_tokens_decoder"}
    with files.atomic_directory(out, replace=replace) as temporary:
        (temporary / TOKENIZER_FILE).write_text(json.dumps(specification, ensure_ascii=False))
        files.write_json(temporary / TOKENIZER_CONFIG, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
        made = load_tokenizer(temporary, tokenizer.added_tokens)
        found = [made.token_to_id(token) for token in added]
        expected = list(range(tokenizer.vocab_size, tokenizer.vocab_size + len(added)))
        if found != expected or not tokenizer.entries.items() <= made.entries.items():
            raise InputError(
                f"{tokenizer.folder}: {', '.join(added)} would get the ids {found}, expected those from "
                f"{tokenizer.vocab_size} on; its vocabulary has holes: use a tokenizer without, or one that has them"
            )
    made.folder = out
    return made
