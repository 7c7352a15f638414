"""Of which model an export is, and how that one was trained, back through its parents as far as they lie here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.data.origin import Parent, origin_of
from argonne.errors import InputError
from argonne.model.load import FoundModel, resolve_model
from argonne.model.stored import fingerprint_of_weights
from argonne.tokens.tokenizer import load_tokenizer


def source_of(name: str | Path, found: FoundModel) -> dict[str, Any]:
    """For an export's record: MODEL as it was called, the step of the run that trained it, and fingerprints of its
    weights and tokenizer.
    """
    tokenizer = found.tokenizer_folder
    return {
        "model": str(name),
        "run_id": found.run_id,
        "step": found.step,
        "tokens": found.tokens,
        "weights": fingerprint_of_weights(found.folder),
        "tokenizer": None if tokenizer is None else load_tokenizer(tokenizer).fingerprint,
    }


@dataclass(frozen=True)
class Trained:
    """One training of a model's past. state: of its checkpoint. run: its folder."""

    run: Path
    state: dict[str, Any]

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that it read."""
        phases = self.state.get("data", {}).get("phases", [])
        rows = [*(phase.get("sequence_length") for phase in phases), self.state["recipe"]["data"]["sequence_length"]]
        return max(length for length in rows if length is not None)


def past_of(model: str | Path) -> list[Trained] | None:
    """Every training that a model comes from, each after its parents; of an average that of each part. None where one
    is not on this disk, or nothing tells.
    """
    try:
        found = _walk(Parent(model), set())
    except InputError:
        return None
    return found or None


def _walk(model: Parent, seen: set[Path]) -> list[Trained]:
    origin = origin_of(model.model, model.run_id, model.step)
    place = origin.checkpoint or origin.run
    if place is not None and place in seen:
        return []
    if place is not None:
        seen.add(place)
    before = [training for parent in origin.parents for training in _walk(parent, seen)]
    return before if origin.run is None else [*before, Trained(origin.run, origin.state)]


def opened_source(record: dict[str, Any], given: str | None, folder: Path) -> str:
    """MODEL of an export: `given`, or what the export's record names. Raises InputError where it is gone or has
    other weights now.
    """
    source = record["source"]
    name = given or source.get("model")
    if name is None:
        raise InputError(f"{folder}: its record does not say where its model lies; name it with --source MODEL")
    if not Path(name).expanduser().exists():
        raise InputError(
            f"{folder}: was made from {name}, which is not on this disk; what is published is compared with it: name "
            "it with --source MODEL"
        )
    now = fingerprint_of_weights(resolve_model(name).folder)
    if now != source["weights"]:
        raise InputError(
            f"{folder}: is of other weights ({source['weights'][:12]}) than {name} has now ({now[:12]}); export that "
            "again, or name the checkpoint it was made from with --source"
        )
    return str(name)
