"""What the folder of a model tells of where its weights come from: its run, the sources that it read, and the models
before it.

A checkpoint's state.json tells the recipe, every source that was read by name and fingerprint, and where the run
began; a merge's record tells its parts.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.data.phases import source_name
from argonne.errors import InputError
from argonne.files import read_json
from argonne.layout import Kind
from argonne.tokens.shards import TokenSet


@dataclass(frozen=True)
class Parent:
    """A model that another began with, as that one wrote it down: None where nothing told. weights: a
    fingerprint.
    """

    model: str | Path
    run_id: str | None = None
    step: int | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Origin:
    """state: of the checkpoint; of a run that has none any more, its recipe and manifest. sources: (name, fingerprint)
    of what was read, without fingerprints where the state is gone. All None and empty of what is no run.
    """

    parents: list[Parent]
    run: Path | None = None
    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    sources: list[tuple[str, str | None]] = field(default_factory=list)


def run_of(path: Path) -> Path | None:
    """The run that a run, a checkpoint or a final model belongs to."""
    kind = layout.kind_of(path)
    if kind is Kind.RUN:
        return path
    final = path.name == layout.FINAL_MODEL and layout.kind_of(path.parent) is Kind.RUN
    return path.parent if final or kind is Kind.CHECKPOINT else None


def origin_of(model: str | Path, run_id: str | None = None, step: int | None = None) -> Origin:
    """The origin of a run, a checkpoint, a final model or a merge, as it was at a step where one is given. Raises
    InputError for anything else, and for a run with another id than `run_id`.
    """
    path = layout.followed(Path(model)).resolve()
    run = run_of(path)
    if run is None:
        if layout.kind_of(path) is Kind.MODEL_FOLDER and (path / layout.MERGE_RECORD).is_file():
            merged = read_json(path / layout.MERGE_RECORD)["merged"]
            return Origin([_parent(part["model"], part) for part in merged])
        what = layout.kind_of(path).value if path.exists() else "not on this disk"
        raise InputError(f"is {what}, which does not tell its data")
    exact = run / layout.checkpoint_name(step or 0)  # its recipe is the one of then
    is_checkpoint = layout.kind_of(path) is Kind.CHECKPOINT
    checkpoint = path if is_checkpoint else exact if exact.is_dir() else layout.last_checkpoint(run)
    state = _recorded(run) if checkpoint is None else read_json(checkpoint / layout.STATE)
    if run_id not in (None, state.get("run_id")):
        raise InputError(f"holds the run {state.get('run_id')} now, not {run_id}")
    return Origin(_parents(run, state), run, checkpoint, state, _names(state, step))


def _recorded(run: Path) -> dict[str, Any]:
    if not (run / layout.CONFIG).is_file():
        raise InputError(f"{run / layout.CONFIG}: no such file")
    recipe = tomllib.loads((run / layout.CONFIG).read_text(encoding="utf-8"))
    return {"recipe": recipe, **read_json(run / layout.MANIFEST)}


def _parents(run: Path, state: dict[str, Any]) -> list[Parent]:
    parent = state.get("parent") or {}
    if not parent:
        return []
    before = parent["model"] if "model" in parent else _beside(run, parent)
    return [_parent(before, parent)]


def _parent(model: str | Path, told: dict[str, Any]) -> Parent:
    return Parent(model, told["run_id"], told["step"], told.get("weights"))


def _beside(run: Path, parent: dict[str, Any]) -> str | Path:
    """The run of the checkpoint with which --resume-from began, a folder beside: only name and id are known."""
    for manifest in sorted(run.parent.glob(f"*/{layout.MANIFEST}")):
        if parent["run_id"] is not None and read_json(manifest).get("run_id") == parent["run_id"]:
            return manifest.parent
    return f"{parent['checkpoint']}{f' of run {run_id}' if (run_id := parent['run_id']) else ''}"


def _names(state: dict[str, Any], step: int | None) -> list[tuple[str, str | None]]:
    """(name, fingerprint) of the sources read before a step; no fingerprints where the state is gone."""
    phases = state.get("data", {}).get("phases")
    if phases is None:
        return [(name, None) for name in _paths(state["recipe"])]
    before = [phase for phase in phases if step is None or phase["first_step"] < step]
    listed = [(source["name"], source["fingerprint"]) for phase in before for source in phase["sources"]]
    return list(dict.fromkeys(listed))


def _paths(recipe: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for section in recipe.get("data", {}).get("sources", []):
        found[source_name(section["path"], set(found))] = section["path"]
    return found or {"text": layout.RUN_TOKENS}


def path_of_source(origin: Origin, name: str) -> str | None:
    """Where the recipe says that a source lies; None where it was read before data.sources were changed."""
    recipe = origin.state["recipe"]
    path = _paths(recipe).get(name)
    return str(origin.run / path) if path and origin.run and recipe.get("data", {}).get("input") else path


def lies_here(path: str) -> bool:
    """Is there anything at the path of a source: a folder, a file, a pattern or a `raw-uint16:PATH`?"""
    for prefix in layout.RAW_TOKENS:
        path = path.removeprefix(prefix)
    return bool(layout.matches_of(path)) if layout.is_pattern(path) else Path(path).exists()


def holds(tokens: TokenSet, fingerprint: str | None) -> bool:
    """Are these the tokens that a run read under a fingerprint? Tokens made of text in the run's sight, which it read
    while they grew, go by that of their plan.
    """
    return fingerprint in (None, tokens.fingerprint, tokens.manifest.get("plan"))


def rendered_folder(origin: Origin, fingerprint: str) -> Path:
    """Where the conversations that a run was trained on lie as they were rendered, while the cache is kept."""
    cache = (origin.state["recipe"].get("chat") or {}).get("cache") or (origin.run or Path()) / layout.CONVERSATIONS
    return Path(cache) / fingerprint[:24]
