"""Files that nobody's writer meant: whatever their bytes, reading ends in rows or in one line that names the file.

What apache's parquet-testing and arrow-testing keep as bad data is made here anew: schemas that are legal and strange,
and good files with bytes flipped, cut out or repeated.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from argonne.errors import InputError
from argonne.prepare import documents
from argonne.prepare.documents import InputFile, Unit
from tests.prepare.helpers import arguments
from tests.tokensets import words

TEXT = pa.array(["one", "two", None])
KINDS = ("parquet", "file", "stream")


def written(table: pa.Table, kind: str, folder: Path) -> Path:
    path = folder / f"in.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        parquet.write_table(table, path, store_schema=False, row_group_size=50)
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    return path


def read(path: Path, column: str | None = "text") -> tuple[int, int]:
    """(documents and rows, 0) of the whole file, of one column or of all. Raises InputError."""
    kinds = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "jsonl"}
    file, found = InputFile(str(path), kinds[path.suffix], path.stat().st_size), 0
    for start, stop in documents.cut(file, 1 << 20, column):
        unit = Unit(0, 0, start, stop)
        if column is None:
            found += sum(1 for _ in documents.read_rows(file, unit))
        else:
            for batch in documents.read_unit(file, unit, column, "file"):
                found += len(batch.texts) + batch.drops.total()
    return found, 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["text", None])
def test_two_columns_of_one_name_are_refused(kind: str, column: str | None, tmp_path: Path) -> None:
    table = pa.Table.from_arrays([TEXT, TEXT], names=["text", "text"])
    with pytest.raises(InputError, match=r"in.*2 columns of the name 'text'"):
        read(written(table, kind, tmp_path), column)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["text", None])
def test_a_name_that_is_not_utf8_is_named_with_its_file(kind: str, column: str | None, tmp_path: Path) -> None:
    path = written(pa.table({"text": TEXT, "other_name": TEXT}), kind, tmp_path)
    path.write_bytes(path.read_bytes().replace(b"other_name", b"oth\xff\xfename_"))
    with pytest.raises(InputError, match=r"in\.\w+: .*codec can't decode"):
        read(path, column)


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize(
    "values",
    [
        pa.array([2**62], pa.duration("s")),
        pa.array([2**31 - 1], pa.date32()),
        pa.array([0], pa.timestamp("s", tz="No/Where")),
        pa.array([2**62], pa.timestamp("s")),
    ],
    ids=lambda values: str(values.type),
)
def test_a_value_that_python_has_none_for_is_one_line_where_it_is_read_and_nothing_where_it_is_not(
    kind: str, values: pa.Array, tmp_path: Path
) -> None:
    path = written(pa.table({"text": ["one"], "time": values}), kind, tmp_path)
    assert read(path) == (1, 0)
    with pytest.raises(InputError, match=r"in\.arrow: after row 0: cannot be read"):
        read(path, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([{"a": "x"}]), "holds struct<a: string>, expected text"),
        (pa.array([["x"]]), "holds list<.*: string>, expected text"),
        (pa.nulls(1), "holds null, expected text"),
        (pa.array([1]).dictionary_encode(), "holds int64, expected text"),
        (pa.array([b"x"]), "holds binary, expected text"),
    ],
)
def test_a_column_of_another_kind_is_refused_by_name(kind: str, column: pa.Array, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read(written(pa.table({"text": column}), kind, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_columns_and_one_with_huge_metadata_are_read_for_what_they_are(
    kind: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no column 'text'; it has none"):
        read(written(pa.Table.from_arrays([], names=[]), kind, tmp_path))
    huge = pa.table({"text": TEXT}).replace_schema_metadata({"k": "x" * 5_000_000})
    assert read(written(huge, kind, tmp_path)) == (3, 0)


def good(kind: str, folder: Path) -> Path:
    texts = [words(8, number) for number in range(120)]
    if kind == "jsonl":
        (folder / "in.jsonl").write_text("".join(json.dumps({"text": text, "n": 1.5}) + "\n" for text in texts))
        return folder / "in.jsonl"
    names = pa.array([f"name {number % 7}" for number in range(120)]).dictionary_encode()
    nested = pa.array([[{"role": "user", "content": text}] for text in texts])
    return written(pa.table({"text": texts, "name": names, "messages": nested}), kind, folder)


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """Some bytes flipped, a piece cut out, an end cut off, or a piece twice."""
    begin, size = draw.randrange(len(whole)), draw.randrange(1, 64)
    how = draw.randrange(4)
    if how == 0:
        part = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            part[draw.randrange(len(part))] ^= 1 << draw.randrange(8)
        return bytes(part)
    return [whole[:begin] + whole[begin + size :], whole[:begin], whole[: begin + size] + whole[begin:]][how - 1]


@pytest.mark.parametrize("kind", [*KINDS, "jsonl"])
def test_whatever_the_bytes_reading_ends_in_rows_or_in_one_line(kind: str, tmp_path: Path) -> None:
    path, draw = good(kind, tmp_path), random.Random(kind)
    whole, refusals = path.read_bytes(), list[str]()
    for _ in range(60):
        path.write_bytes(damaged(whole, draw))
        for column in ("text", "name", None):
            try:
                read(path, column)
            except InputError as error:
                refusals.append(str(error))
    assert [text for text in refusals if str(path) not in text or "\n" in text] == []
    assert refusals or kind == "jsonl"  # whose lines are rows, good or faulty


def test_whatever_byte_of_a_parquet_footer_is_flipped_no_process_dies(tmp_path: Path) -> None:
    """What pyarrow throws where it reads a column's description reached no Python code, and ended the process."""
    path = good("parquet", tmp_path)
    whole = path.read_bytes()
    size = int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for place in range(len(whole) - 8 - size, len(whole)):
        part = bytearray(whole)
        part[place] ^= 1 << place % 8
        path.write_bytes(part)
        try:
            read(path)
        except InputError:
            refused += 1
    assert refused > size // 4


@pytest.mark.campaign
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", [*KINDS, "jsonl"])
def test_whatever_the_bytes_prepare_ends_well_or_with_one_line_and_exit_code_2(
    kind: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    path, draw = good(kind, tmp_path), random.Random(f"campaign {kind}")
    whole = path.read_bytes()
    for number in range(100):
        path.write_bytes(damaged(whole, draw))
        command = [sys.executable, "-m", "argonne", *arguments(path, tokenizer_folder, tmp_path / f"out-{number}")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 2), (number, done.returncode, done.stderr[-2000:])
        assert "Traceback" not in done.stderr
