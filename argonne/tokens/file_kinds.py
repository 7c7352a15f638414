"""Which files hold text, by their names, and the order in which numbered files are read."""

from __future__ import annotations

import re
from collections.abc import Mapping

SUFFIXES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json.gz": "jsonl",
    ".ndjson": "jsonl",
    ".ndjson.gz": "jsonl",
    ".ndjson.zst": "jsonl",
    ".txt": "txt",
    ".txt.gz": "txt",
    ".txt.zst": "txt",
    ".md": "txt",
    ".md.gz": "txt",
    ".md.zst": "txt",
}
KINDS = ".parquet, .arrow, .jsonl, .ndjson, .txt or .md, the text kinds also with .gz or .zst"


def natural_key(path: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `shard_2` before `shard_10`; equal numbers written differently keep a fixed order."""
    pieces = re.split(r"(\d+)", path)
    return [(0, int(piece), piece) if piece.isdigit() and piece.isascii() else (1, 0, piece) for piece in pieces]


def format_of(path: str, also: Mapping[str, str] | None = None) -> str | None:
    name = path.rsplit("/", 1)[-1].lower()
    return next((kind for suffix, kind in {**SUFFIXES, **(also or {})}.items() if name.endswith(suffix)), None)
