"""What `argonne prepare` says to a person: what it found, why it found nothing, what may surprise."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from argonne.prepare.documents import InputFile
from argonne.prepare.hold_out import BY_CUT
from argonne.prepare.matching import described
from argonne.prepare.textual import field_names

ADVICE = {
    "invalid-json": "each line must be one JSON object; an array becomes lines with "
    "`jq -c '.[]' FILE.json > FILE.jsonl`",
    "invalid-utf8": "convert the files first: `iconv -f ENCODING -t UTF-8`",
    "empty": "check how the files were written",
}


def describe_drops(drops: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(drops.items()))


def input_summary(found: Sequence[InputFile], not_taken: Mapping[str, int]) -> str:
    """One line for what the patterns matched, and for what lies beside it in the folders and is not taken."""
    kinds = Counter(file.format for file in found)
    listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    beside = f"; {described(not_taken)}" if not_taken else ""
    return f"input: {listed} file{'s' if len(found) > 1 else ''}, {size(sum(file.bytes for file in found))}{beside}"


def size(count: int) -> str:
    """Bytes as a person says them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def advice(drops: Mapping[str, int]) -> str:
    """What to do about the most frequent fault; nothing where that says itself."""
    return ADVICE.get(max(drops, key=lambda reason: drops[reason], default=""), "")


def no_text(found: Sequence[InputFile], text_column: str, drops: Mapping[str, int]) -> str:
    """Why input of which no row is a document cannot be used, and what to do."""
    names = found[0].path + (f" and {len(found) - 1:,} more" if len(found) > 1 else "")
    if not drops:
        return f"input {names}: holds no row; check the pattern, and that the files were written to their end"
    if not (remedy := advice(drops)):
        fields = next((fields for file in found if file.format == "jsonl" and (fields := field_names(file.path))), [])
        has = f"a row has {', '.join(fields[:8])}; " if fields else ""
        remedy = f"{has}{text_column!r} was looked for: name the column or field with --text-column"
    return f"input {names}: no row has text in it ({describe_drops(drops)}); {remedy}"


def account(manifest: Mapping[str, Any]) -> str:
    """One line in which every row is somewhere."""
    dropped = sum(manifest["drops"].values())
    reasons = f" ({describe_drops(manifest['drops'])})" if dropped else ""
    split, held = manifest["held_out"], ""
    if split.get("rule") == BY_CUT:
        ends = f"; of {split['documents']:,} of them the last {100 * split['share']:g} % are held out"
    else:
        expected = split["share"] * (manifest["documents"] + split["documents"])
        held = f" + {split['documents']:,} held out (expected {expected:,.0f})" if split["share"] else ""
        ends = ""
    bad = (
        f"; {len(manifest['bad_files']):,} files could not be read whole, see bad_files in the manifest"
        if manifest["bad_files"]
        else ""
    )
    kept = f"{manifest['documents']:,} documents{held}"
    return f"{manifest['rows']:,} rows = {kept} + {dropped:,} dropped{reasons}{ends}{bad}"


def held_out_warning(manifest: Mapping[str, Any]) -> str | None:
    """A hold-out that came out empty, or that left nothing to train on: with few documents the share rounds to that."""
    share, held, documents = manifest["held_out"]["share"], manifest["held_out"]["documents"], manifest["documents"]
    if not share or (held and documents):
        return None
    total = held + documents
    if held:
        return (
            f"warning: --hold-out {share} held out all {total:,} documents; nothing is left to train on: give a "
            "smaller share or more text"
        )
    return (
        f"warning: --hold-out {share} held out none of {total:,} documents, so that no held-out loss can be measured; "
        f"give --hold-out {min(0.5, 2 / total):.2g} or more, or more documents"
    )


def not_written(error: OSError, out: Path) -> str:
    """What an error of the operating system means for the user."""
    if error.errno == errno.ENOSPC:
        return (
            f"{out}: no space left on the disk; the units that are finished are kept: free some and run the same "
            "command again"
        )
    reason = error.strerror or str(error)
    return (
        f"{error.filename or out}: {reason}; check the path and that you may read and write there, then run the same "
        "command again"
    )
