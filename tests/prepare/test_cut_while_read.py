"""Files that are cut while they are read: one line, and neither a dead process nor other text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from argonne.errors import InputError
from argonne.prepare import documents, encode
from argonne.prepare.documents import InputFile, Unit
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.prepare.texts import LongText, RowBatch
from tests.prepare.helpers import QUIET
from tests.tokensets import words

LINE = f"{words(400)}.\n"


def batches(path: Path, format: str, size: int) -> Iterator[RowBatch]:
    file = InputFile(str(path), format, path.stat().st_size)
    for batch in documents.read_unit(
        file, Unit(0, 0, 0, documents.WHOLE_FILE if format == "txt" else 40), "text", "file"
    ):
        yield batch
        os.truncate(path, size)


def test_a_text_file_that_is_cut_between_two_reads_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text(LINE * 2000)
    batch, *_ = batches(tmp_path / "in.txt", "txt", 5000)
    (text,) = batch.texts
    assert isinstance(text, LongText)
    with pytest.raises(InputError, match=r"in.txt: cannot be read \(it ends at byte 5,000, and was longer"):
        list(text.blocks())


@pytest.mark.parametrize("stream", [False, True])
def test_an_arrow_file_that_is_cut_between_two_batches_is_named(tmp_path: Path, stream: bool) -> None:
    path, table = tmp_path / "in.arrow", pa.table({"text": [LINE] * 4000})
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    with pytest.raises(InputError, match=r"in.arrow: after row \d+.*: cannot be read"):
        list(batches(path, "arrow", 5000))


@pytest.mark.parametrize(
    "edit", [lambda path: os.truncate(path, 2_000_000), lambda path: path.write_bytes(b"\xff" * 10**7)]
)
def test_a_text_file_that_is_changed_while_it_is_tokenised_ends_the_work_with_its_name(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Any
) -> None:
    path = tmp_path / "in.txt"
    path.write_text(LINE * 4000)
    take = encode._UnitWork.take

    def taken(self: Any, batch: RowBatch, source: int) -> None:
        edit(path)
        take(self, batch, source)

    monkeypatch.setattr(encode._UnitWork, "take", taken)
    options = PrepareOptions((str(path),), tmp_path / "out", tokenizer_folder, workers=1, skip_bad_shards=True)
    with pytest.raises(InputError, match=r"in.txt: (cannot be read \(it ends|was changed while it was read)"):
        prepare(options, QUIET)
