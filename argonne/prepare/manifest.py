"""What a finished token set says of itself: what is in it, what was left out and why, what it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from argonne import files
from argonne.errors import InputError
from argonne.prepare.messages import advice, describe_drops
from argonne.prepare.options import PrepareOptions
from argonne.tokens import shards as tokens

FAULTS = ("missing", "not-text", "empty", "invalid-utf8", "invalid-json")


def check_drops(options: PrepareOptions, records: list[dict[str, Any]], out: Path) -> None:
    manifest = totals(records)
    bad_rows = sum(manifest["drops"].get(reason, 0) for reason in FAULTS)
    if bad_rows > options.max_drop_fraction * max(manifest["rows"], 1):
        raise InputError(
            f"{out}: {bad_rows:,} of {manifest['rows']:,} rows are no documents ({describe_drops(manifest['drops'])}), more than "
            f"--max-drop-fraction {options.max_drop_fraction}; mend the input{advice(manifest['drops'])}, or raise the limit and "
            "run again: the work so far is kept"
        )
    if manifest["documents"] + manifest["held_out_documents"] == 0:
        raise InputError(f"{out}: no document is left of {manifest['rows']:,} rows ({describe_drops(manifest['drops']) or 'it is empty'})")


def build_manifest(plan: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest: what is in the set, what was left out and why, what it was made from. No times, no hosts: equal input, equal bytes."""
    sources = []
    for number, file in enumerate(plan["files"]):
        own = [record for record, unit in zip(records, plan["units"], strict=True) if unit["file"] == number]
        sources.append({**file, **totals(own)})
    held = [record["held_out"] for record in records]
    return {
        "format": tokens.FORMAT,
        "format_version": tokens.FORMAT_VERSION,
        "dtype": tokens.dtype_for(plan["tokenizer"]["vocab_size"]),
        "tokenizer": plan["tokenizer"],
        **totals(records),
        "held_out": {
            "share": plan["recipe"]["hold_out"],
            **{name: sum(part[name] for part in held) for name in ("tokens", "documents", "text_bytes")},
            "shards": [shard for part in held for shard in part["shards"]],
        },
        "shards": [shard for record in records for shard in record["shards"]],
        "recipe": plan["recipe"],
        "plan": files.fingerprint(plan),
        "sources": sources,
        "evaluation_files": plan["evaluation_files"],
        "bad_files": plan["bad_files"] + [bad for record in records for bad in record["bad"]],
    }


def totals(records: list[dict[str, Any]]) -> dict[str, Any]:
    totals: dict[str, Any] = {name: sum(record[name] for record in records) for name in ("rows", "documents", "tokens", "text_bytes")}
    totals["held_out_documents"] = sum(record["held_out"]["documents"] for record in records)
    drops: dict[str, int] = {}
    for record in records:
        for reason, count in record["drops"].items():
            drops[reason] = drops.get(reason, 0) + count
    return {**totals, "drops": dict(sorted(drops.items()))}
