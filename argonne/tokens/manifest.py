"""The manifest of a token set: what is in it, what was left out and why, what it was made from. Written last, it makes
the set complete. Version 1 is final.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from argonne import files
from argonne.errors import InputError
from argonne.layout import MANIFEST, SOURCES, TOKENIZER, UNITS_PLAN, index_of

FORMAT, FORMAT_VERSION = "argonne-tokens", 1
SOURCES_IN_MANIFEST = 1000


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder; InputError when it is unfinished, foreign or of a later version."""
    if not (folder / MANIFEST).is_file():
        unfinished = (
            "; `argonne prepare` was interrupted here: run it again to finish" if (folder / UNITS_PLAN).exists() else ""
        )
        advice = unfinished or "; name a folder that `argonne prepare` wrote, or a token file in it"
        raise InputError(f"{folder}: no {MANIFEST} in this folder, so it is no finished token set{advice}")
    manifest = files.read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{folder / MANIFEST}: not the manifest of a token set (no format {FORMAT!r})")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder / MANIFEST}: format version {manifest.get('format_version')}, this argonne reads "
            f"{FORMAT_VERSION}; update argonne"
        )
    return manifest


def entries_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards that a manifest, or the record of a unit, names: training, then held out."""
    return [*record["shards"], *record["held_out"]["shards"]]


def sources_of(folder: Path, manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What was read into a set, file by file: path, format, bytes, and what became of its rows."""
    if "sources_file" not in manifest:
        yield from manifest["sources"]
        return
    with open(folder / SOURCES, encoding="utf-8", newline="\n") as lines:
        yield from map(json.loads, lines)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `sha256.json` (every file of the set, in the form of `files.seal_directory`), then the manifest: the last
    file makes the set complete. Sources past a thousand stand in a file of their own: a set opens in no time."""
    entries: dict[str, Any] = {}
    if (count := len(manifest["sources"])) > SOURCES_IN_MANIFEST:
        lines = "".join(json.dumps(source, ensure_ascii=False) + "\n" for source in manifest["sources"])
        files.write_text(folder / SOURCES, lines)
        entries[SOURCES] = {
            "bytes": (folder / SOURCES).stat().st_size,
            "sha256": files.sha256_of_file(folder / SOURCES),
        }
        manifest = {**manifest, "sources": [], "sources_file": {"file": SOURCES, "sources": count}}
    content = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    entries[MANIFEST] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for entry in entries_of(manifest):
        entries[entry["file"]] = {"bytes": entry["bytes"], "sha256": entry["sha256"]}
        entries[index_of(Path(entry["file"])).name] = {"bytes": 8 * entry["documents"], "sha256": entry["index_sha256"]}
    for path in sorted((folder / TOKENIZER).iterdir()):
        if path.name != files.HASH_LIST:
            files.fsync_path(path)
            entries[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": files.sha256_of_file(path),
            }
    files.write_json(folder / files.HASH_LIST, {"format_version": 1, "files": entries})
    files.write_bytes(folder / MANIFEST, content)
