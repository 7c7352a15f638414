"""A tokenizer without turn tokens in a stage of conversations: its run keeps one that has them, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.layout import TOKENIZER, last_checkpoint, tokenizer_of
from argonne.model.load import resolve_model
from argonne.plan.shape import missing_chat_tokens
from argonne.stages.start import Start
from argonne.tokens.chat_tokens import kept_chat_tokens
from argonne.tokens.tokenizer import AddedTokens, TextTokenizer, load_tokenizer
from argonne.train.run import RunFolder

ADDED_TOKENS = "added_tokens"  # in the manifest


def chat_tokenizer(recipe: Recipe, run_folder: Path) -> TextTokenizer:
    """The tokenizer that the recipe names, or else that of the weights; where it lacks tokens that the template needs,
    the one in tokenizer/ of the run, which has them.
    """
    tokenizer = load_tokenizer(_named(recipe, run_folder))
    missing = missing_chat_tokens(recipe, tokenizer.entries)
    return kept_chat_tokens(tokenizer, run_folder / TOKENIZER, missing) if missing else tokenizer


def _named(recipe: Recipe, run_folder: Path) -> Path:
    if recipe.data.tokenizer:
        return Path(recipe.data.tokenizer)
    start, last = recipe.model.init_from, last_checkpoint(run_folder)
    if last is not None and not (start and Path(start).expanduser().exists()):
        # The run goes on when what it began with is gone. A checkpoint may go too, and its tokenizer with it.
        return tokenizer_of(run_folder) or last / TOKENIZER
    found = None if start is None else resolve_model(start).tokenizer_folder
    if found is None:
        raise InputError(
            "data.tokenizer: not set, and there are no weights that bring one; give --init-from MODEL, or the "
            "tokenizer's folder"
        )
    return found


def added_tokens(run: RunFolder, recipe: Recipe, start: Start, added: AddedTokens | None) -> dict[str, Any] | None:
    """What the manifest says of tokens that were added when the run began; None where there were none. rows: of the
    embedding in the weights that it began with, and in the run.
    """
    known: dict[str, Any] | None = run.manifest().get(ADDED_TOKENS) if start.own and run.exists() else None
    if known is not None or added is None:
        return known
    rows = recipe.model.vocab_size
    before = (start.weights_config or {}).get("vocab_size", rows)
    ids = dict(zip(added.names, added.ids, strict=True))
    return {"tokenizer": str(added.base_folder), "fingerprint": added.base, "ids": ids, "rows": [before, rows]}


def told(added: dict[str, Any], new: bool) -> str:
    """The line that says what was added, to which tokenizer, and where the rows come from. new: in this session."""
    tokens = ", ".join(f"{token} {token_id}" for token, token_id in added["ids"].items())
    before, after = added["rows"]
    if not new:
        table = f"the embedding has {after:,} rows, as the run began"
    elif before == after:
        table = f"the embedding stays at {after:,} rows, their spare ones begin as the mean of the others"
    else:
        table = f"embedding {before:,} -> {after:,} rows, the new ones begin as the mean of the others"
    return f"added to the tokenizer {added['tokenizer']}: {tokens}; {table}"
