"""A small part of conversations, as files of their own: the whole would be rendered before the first step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from argonne.config import SourceSection
from argonne.prepare import documents
from argonne.prepare.texts import Refused

WHOLE = 1 << 20  # bytes of a source that is read as it is
ROWS, PLACES = 400, 8
ENOUGH = 50.0  # passes: what the most rows of a rehearsal need of a single one


def sample(sources: tuple[SourceSection, ...], folder: Path) -> tuple[SourceSection, ...]:
    """Each source with its rows from several places, written below `folder`; a small one stays as it is. Raises
    InputError for one that cannot be read.
    """
    return tuple(_sampled(source, folder / f"source-{number}.jsonl") for number, source in enumerate(sources))


def _sampled(source: SourceSection, to: Path) -> SourceSection:
    often = max(source.max_epochs, ENOUGH)
    files = documents.find_files([source.path])
    if sum(file.bytes for file in files) <= WHOLE:
        return replace(source, max_epochs=often)
    units = [(file, *piece) for file in files for piece in documents.cut(file, documents.unit_bytes(files), None)]
    chosen = units[:: max(1, len(units) // PLACES)][:PLACES]
    lines = []
    for number, (file, start, stop) in enumerate(chosen):
        for count, (_, row) in enumerate(documents.read_rows(file, documents.Unit(number, 0, start, stop))):
            if count >= ROWS // len(chosen):
                break
            lines.append("{" if isinstance(row, Refused) else json.dumps(row, ensure_ascii=False, default=str))
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return replace(source, path=str(to), max_epochs=often)
