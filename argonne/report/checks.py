"""Hashes and fingerprints of what lies on disk, each read once, however many links of a chain ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from argonne import layout
from argonne.files import QUICK_LIST, damage_in, hash_list_of


class Checks:
    """What was read so far, by folder."""

    def __init__(self) -> None:
        self._damage: dict[Path, dict[str, str]] = {}
        self._weights: dict[Path, str | None] = {}
        self._tokens: dict[str, dict[str, Any]] = {}

    def damage(self, folder: Path) -> dict[str, str]:
        """A line for each file that is not as the folder's hash list says, by its name."""
        key = folder.resolve()
        if key not in self._damage:
            self._damage[key] = damage_in(folder)
        return self._damage[key]

    def problems(self, folder: Path) -> list[str]:
        """The lines alone."""
        return list(self.damage(folder).values())

    def problems_if_sealed(self, folder: Path) -> list[str]:
        """None where the folder has no hash list: others' folders have none."""
        return self.problems(folder) if hash_list_of(folder).exists() else []

    def hashed_by(self, folder: Path) -> str | None:
        """The name of the hash in the folder's list; None where it has none."""
        hash_list = hash_list_of(folder)
        return None if not hash_list.exists() else "XXH3" if hash_list.name == QUICK_LIST else "sha256"

    def weights(self, folder: Path) -> str | None:
        """The fingerprint of the weights of a folder; None where it has no safetensors."""
        from argonne.model.stored import fingerprint_of_weights

        key = folder.resolve()
        if key not in self._weights:
            self._weights[key] = fingerprint_of_weights(folder) if any(folder.glob(layout.WEIGHTS)) else None
        return self._weights[key]

    def tokens(self, path: str) -> dict[str, Any]:
        """The facts of a token set, every byte of it verified. Raises InputError where it is none."""
        from argonne.tokens.inspection import inspect_tokens

        if path not in self._tokens:
            self._tokens[path] = inspect_tokens(path)
        return self._tokens[path]


def differing_tensors(folder: Path, other: Path) -> list[str]:
    """The tensors of a folder that are not those of the other, in the dtype of the first; both may be checkpoints.
    Raises InputError for a file that cannot be read.
    """
    import torch

    from argonne.model.load import family_config, tensors_of

    mine, theirs = tensors_of(folder), tensors_of(other)
    tied = {"lm_head.weight"} if family_config(other).get("tie_word_embeddings") else set()
    found = sorted((mine.shapes.keys() ^ theirs.shapes.keys()) - tied)
    for name in sorted(mine.shapes.keys() & theirs.shapes.keys()):
        tensor = mine.read(name)
        if not torch.equal(tensor, theirs.read(name).to(tensor.dtype)):
            found.append(name)
    return found
