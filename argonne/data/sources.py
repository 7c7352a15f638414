"""The sources of a mixture: token sets opened under a name, and the tokenizer they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from argonne.config import DataSection
from argonne.data import mixture as mixtures
from argonne.errors import InputError
from argonne.tokens.formats import open_tokens
from argonne.tokens.shards import TokenSet
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened source of the mixture."""

    name: str
    tokens: TokenSet
    weight: str
    max_epochs: float


def open_sources(data: DataSection) -> list[Source]:
    sources: list[Source] = []
    for section in data.sources:
        opened = open_tokens(section.path)
        name = _name(section.path, {source.name for source in sources})
        if twin := next((source for source in sources if source.tokens.fingerprint == opened.fingerprint), None):
            raise InputError(
                f"data.sources: {section.path} holds the same tokens as {twin.tokens.path}; name it once, with the sum of the weights"
            )
        sources.append(Source(name, opened, mixtures.exact_weight(section.weight), section.max_epochs))
    return sources


def _name(path: str, taken: set[str]) -> str:
    base = Path(path).stem if Path(path).suffix == ".bin" and Path(path).stem != "train" else Path(path).name
    base = Path(path).parent.name if base in ("train.bin", "train") else base
    return base if base not in taken else next(f"{base}-{number}" for number in range(2, 1000) if f"{base}-{number}" not in taken)


def shared_tokenizer(data: DataSection, sources: Sequence[Source]) -> TextTokenizer:
    """The tokenizer that all sources share."""
    folders = [source.tokens.tokenizer_folder for source in sources if source.tokens.tokenizer_folder is not None]
    folder = Path(data.tokenizer) if data.tokenizer else (folders[0] if folders else None)
    if folder is None:
        raise InputError(f"{sources[0].tokens.path}: does not say which tokenizer made it; set data.tokenizer to that tokenizer's folder")
    tokenizer = load_tokenizer(folder)
    for source in sources:
        made_with = source.tokens.tokenizer_fingerprint
        if made_with is not None and made_with != tokenizer.fingerprint:
            raise InputError(
                f"{source.tokens.path}: was made with another tokenizer (fingerprint {made_with[:12]}) than {folder} "
                f"({tokenizer.fingerprint[:12]}); "
                f"prepare it again with that tokenizer, or remove data.tokenizer"
            )
    return tokenizer
