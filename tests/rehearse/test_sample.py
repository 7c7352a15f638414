"""The part of conversations that a rehearsal reads."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from argonne.config import SourceSection
from argonne.errors import InputError
from argonne.rehearse import sample as sampling
from argonne.rehearse.sample import ROWS, sample
from tests.tuning import conversations, write


def test_a_small_source_is_read_as_it_is(tmp_path: Path) -> None:
    source = SourceSection(str(write(tmp_path / "chat.jsonl", conversations(60))), 0.5, 3.0)
    (found,) = sample((source,), tmp_path / "out")
    assert (found.path, found.weight, found.max_epochs) == (source.path, 0.5, 50.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_of_a_large_source_rows_from_several_places_are_taken_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "WHOLE", 1000)
    rows = [{**row, "number": number} for number, row in enumerate(conversations(20_000))]
    path = tmp_path / f"chat.{kind}"
    if kind == "jsonl":
        write(path, rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2000)
    (found,) = sample((SourceSection(str(path)),), tmp_path / "out")
    taken = [json.loads(line) for line in Path(found.path).read_text().splitlines()]
    assert ROWS // 2 <= len(taken) <= ROWS
    assert all(row == rows[row["number"]] for row in taken)
    assert taken[0]["number"] == 0
    assert taken[-1]["number"] > 10_000


def test_a_row_that_is_none_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WHOLE", 1)
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": []}\nnot a row\n')
    (found,) = sample((SourceSection(str(path)),), tmp_path / "out")
    assert Path(found.path).read_text().splitlines() == ['{"messages": []}', "{"]


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="matches no file"):
        sample((SourceSection(str(tmp_path / "none*.jsonl")),), tmp_path / "out")
