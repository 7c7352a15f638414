"""Files of text, in every format and with every fault a format can hold: each row is a document or a counted drop."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from argonne.errors import InputError
from argonne.prepare import documents, textual
from argonne.prepare import hold_out as hold_out_rule
from argonne.prepare.documents import Unit, cut, find_files, read_unit
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.prepare.texts import LongText
from argonne.tokens.formats import open_tokens
from argonne.tokens.tokenizer import load_tokenizer
from tests.prepare.helpers import QUIET, documents_of
from tests.tokensets import words

SEPARATOR = "\x1e\n"
BROKEN = object()
Row = Any  # a text, None, a number, bytes that are no UTF-8, or BROKEN: a line that is no JSON object
Writer = Callable[[Path, Sequence[Row]], None]


def reason(row: Row) -> str | None:
    """Why a row is no document."""
    if row is BROKEN:
        return "invalid-json"
    if isinstance(row, bytes):
        return "invalid-utf8"
    if row is None:
        return "missing"
    if isinstance(row, str):
        return None if row else "empty"
    return "not-text"


def line(row: Row, escaped: bool = True) -> bytes:
    if row is BROKEN:
        return b'{"text": "never ends'
    if isinstance(row, bytes):
        return b'{"id": [1, {"text": "inner"}], "text": "' + row + b'"}'
    return json.dumps({"id": [1, {"text": "inner"}], "text": row}, ensure_ascii=escaped).encode()


def jsonl(path: Path, rows: Sequence[Row]) -> None:
    path.write_bytes(b"".join(line(row) + b"\n" for row in rows))


def jsonl_of_windows(path: Path, rows: Sequence[Row]) -> None:
    """A byte order mark, CRLF, blank lines, no line feed at the end."""
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n \r\n".join(line(row, escaped=False) for row in rows))


def jsonl_with_keys_twice(path: Path, rows: Sequence[Row]) -> None:
    """Of equal keys the last counts, as in Python."""
    path.write_bytes(b"\n\n".join(line(row).replace(b"{", b'{"text": "the first", ', 1) for row in rows) + b"\n\n\n")


def jsonl_gz(path: Path, rows: Sequence[Row]) -> None:
    """Several members, cut inside lines."""
    whole = b"".join(line(row) + b"\n" for row in rows)
    path.write_bytes(
        b"".join(gzip.compress(whole[start : start + 100]) for start in range(0, len(whole), 100)) or gzip.compress(b"")
    )


def jsonl_zst(path: Path, rows: Sequence[Row]) -> None:
    """Several frames, cut inside lines, a skippable one and an empty one between them."""
    whole = b"".join(line(row) + b"\n" for row in rows)
    between = struct.pack("<II", 0x184D2A50, 5) + b"hello" + zstandard.compress(b"")
    path.write_bytes(
        between + between.join(zstandard.compress(whole[start : start + 100]) for start in range(0, len(whole), 100))
    )


def packed_with(compress: Callable[[bytes], bytes]) -> Writer:
    """Several streams, cut inside lines, an empty one at the end."""

    def write(path: Path, rows: Sequence[Row]) -> None:
        whole = b"".join(line(row) + b"\n" for row in rows)
        parts = [whole[start : start + 100] for start in range(0, len(whole), 100)]
        path.write_bytes(b"".join(map(compress, [*parts, b""])))

    return write


def txt(path: Path, rows: Sequence[Row]) -> None:
    path.write_bytes(SEPARATOR.encode().join(row if isinstance(row, bytes) else row.encode() for row in rows))


def column(rows: Sequence[Row], kind: pa.DataType) -> Any:
    """An Arrow column of text in which some values may be no UTF-8."""
    values = [None if row is None else row if isinstance(row, bytes) else row.encode() for row in rows]
    if pa.types.is_dictionary(kind):
        entries = [*dict.fromkeys(values)]
        indices = pa.array([None if value is None else entries.index(value) for value in values], kind.index_type)
        return pa.DictionaryArray.from_arrays(
            indices, column([b"" if entry is None else entry for entry in entries], kind.value_type)
        )
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}[kind]
    return pa.Array.from_buffers(kind, len(values), pa.array(values, binary).buffers())


def parquet_of(kind: pa.DataType) -> Writer:
    """Nested columns before the text, several row groups."""

    def write(path: Path, rows: Sequence[Row]) -> None:
        nested = pa.array(
            [{"text": "inner", "list": [1, 2]}] * len(rows),
            pa.struct([("text", pa.string()), ("list", pa.list_(pa.int8()))]),
        )
        table = pa.table(
            {"meta": nested, "tags": pa.array([["a"]] * len(rows), pa.list_(pa.string())), "text": column(rows, kind)}
        )
        parquet.write_table(table, path, row_group_size=7)

    return write


def arrow_of(kind: pa.DataType, random_access: bool) -> Writer:
    """Several record batches, the last of them a slice with an offset."""

    def write(path: Path, rows: Sequence[Row]) -> None:
        schema = pa.schema([("n", pa.int32()), ("text", kind)])
        half = len(rows) // 2
        whole = pa.record_batch([pa.array(range(len(rows)), pa.int32()), column(rows, kind)], schema=schema)
        with (
            pa.OSFile(str(path), "wb") as sink,
            (pa.ipc.new_file if random_access else pa.ipc.new_stream)(sink, schema) as writer,
        ):
            for batch in (whole.slice(0, half), whole.slice(half, 0), whole.slice(half)):
                writer.write_batch(batch)

    return write


WORDS = pa.dictionary(pa.int32(), pa.string())
LINES, COLUMNS, PIECES = "lines", "columns", "pieces"
WRITERS: dict[str, tuple[Writer, str]] = {
    "f_1.jsonl": (jsonl, LINES),
    "f_2.jsonl": (jsonl_of_windows, LINES),
    "f_3.ndjson": (jsonl_with_keys_twice, LINES),
    "f_4.jsonl.gz": (jsonl_gz, LINES),
    "f_5.jsonl.zst": (jsonl_zst, LINES),
    "f_6.txt": (txt, PIECES),
    "f_7.parquet": (parquet_of(pa.string()), COLUMNS),
    "f_8.parquet": (parquet_of(pa.large_string()), COLUMNS),
    "f_9.parquet": (parquet_of(WORDS), COLUMNS),
    "f_10.parquet": (parquet_of(pa.string_view()), COLUMNS),
    "f_11.arrow": (arrow_of(pa.string(), False), COLUMNS),
    "f_12.arrow": (arrow_of(WORDS, False), COLUMNS),
    "f_13.arrow": (arrow_of(pa.string_view(), False), COLUMNS),
    "f_14.arrow": (arrow_of(pa.large_string(), True), COLUMNS),
    "f_15.arrow": (arrow_of(pa.string_view(), True), COLUMNS),
    "f_16.json.bz2": (packed_with(bz2.compress), LINES),
    "f_17.jl.xz": (packed_with(lambda part: lzma.compress(part) + bytes(8)), LINES),
    "f_18.json.zstd": (jsonl_zst, LINES),
    "f_19.jl": (jsonl, LINES),
}


def holds(kind: str, row: Row) -> bool:
    """Can a format of this kind hold the row?"""
    if kind == LINES:
        return True
    if kind == COLUMNS:
        return row is None or isinstance(row, str | bytes)
    return isinstance(row, str | bytes) and bool(row) and "\x1e" not in str(row)


PIECES_OF_TEXT = st.sampled_from(
    [
        "the ",
        "wizards mix ",
        "<|im_end|>",
        "<think>",
        "<|endoftext|>",
        "\0",
        "e\u0301",
        "é",
        "😀",
        "\n",
        "\r\n",
        "  ",
        "\ufeff",
        '"\\',
        "}",
    ]
)
TEXT = st.lists(PIECES_OF_TEXT | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=8).map("".join)
ROW = (
    TEXT
    | TEXT
    | TEXT
    | st.sampled_from([None, "", 7, 1.5, True, ["a"], {"text": "b"}, b"\xff", b"half \xe4", b"\xed\xa0\x80", BROKEN])
)


def reference(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids as the `tokenizers` library alone gives them, control tokens in the text as plain text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(ROW, max_size=20), st.sampled_from([0.0, 0.3]), st.sampled_from([300, 1 << 20]))
def test_every_format_gives_the_same_documents_and_counts_the_same_faults(
    tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory, rows: list[Row], hold_out: float, unit: int
) -> None:
    rows = [*rows, "an anchor"]
    folder = tmp_path_factory.mktemp("formats")
    written = {name: [row for row in rows if holds(kind, row)] for name, (_, kind) in WRITERS.items()}
    for name, (write, _) in WRITERS.items():
        write(folder / name, written[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "unit_bytes", lambda _: unit)
        options = PrepareOptions(
            (str(folder / "f_*"),),
            folder / "out",
            tokenizer_folder,
            hold_out=hold_out,
            split=SEPARATOR,
            max_drop_fraction=1,
            workers=1,
        )
        out = prepare(options, QUIET)
    manifest = open_tokens(out).manifest
    assert [Path(source["path"]).name for source in manifest["sources"]] == list(WRITERS)
    for source in manifest["sources"]:
        expected = written[Path(source["path"]).name]
        drops = Counter(found for row in expected if (found := reason(row)))
        assert (source["rows"], source["drops"]) == (len(expected), dict(drops)), source["path"]
        rows_held = 0 if manifest["held_out"]["rule"] == "cut" else source["held_out_documents"]
        assert source["rows"] == source["documents"] + rows_held + sum(source["drops"].values())
    cut = manifest["held_out"]["rule"] == "cut"
    texts = [row for name in WRITERS for row in written[name] if reason(row) is None]
    eos = manifest["tokenizer"]["eos_id"]
    expected_ids = [[*ids, eos] for ids in reference(tokenizer_folder, texts)]
    if cut:
        tokenizer = load_tokenizer(tokenizer_folder)
        parts = [(hold_out_rule.cut(text, hold_out)) for text in map(str, texts)]
        assert documents_of(out) == [[*tokenizer.encode(begin), eos] for begin, _ in parts]
        assert documents_of(out, held_out=True) == [[*tokenizer.encode(end), eos] for _, end in parts if end]
    elif hold_out:
        assert sorted(documents_of(out) + documents_of(out, held_out=True)) == sorted(expected_ids)
    else:
        assert documents_of(out) == expected_ids


def texts_of(pattern: str | Sequence[str], split: str = "file", target: int = 1 << 20) -> list[str]:
    """The documents of files, read unit by unit."""
    found = []
    for number, file in enumerate(find_files([pattern] if isinstance(pattern, str) else pattern)):
        for start, stop in cut(file, target, "text"):
            for batch in read_unit(file, Unit(0, number, start, stop), "text", split):
                found += [text if isinstance(text, str) else "".join(text.blocks()) for text in batch.texts]
    return found


def test_lines_of_megabytes_that_lie_across_several_units_come_once(tmp_path: Path) -> None:
    texts = [f"{number} " + "wizard " * (200_000 if number % 3 else 3) for number in range(7)]
    jsonl(tmp_path / "in.jsonl", texts)
    for target in (400_000, 1_000_003):
        assert texts_of(str(tmp_path / "in.jsonl"), target=target) == texts


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), WORDS, pa.string_view()], ids=str)
@pytest.mark.parametrize("suffix", ["stream", "file", "parquet"])
def test_a_long_value_of_any_kind_of_column_comes_whole(kind: pa.DataType, suffix: str, tmp_path: Path) -> None:
    rows: list[Row] = ["short", words(250_000), None, b"\xff" * 1_200_000, "größe", words(250_000, 1)]
    path = tmp_path / ("in.parquet" if suffix == "parquet" else "in.arrow")
    (parquet_of(kind) if suffix == "parquet" else arrow_of(kind, suffix == "file"))(path, rows)
    batches = list(
        read_unit(find_files([str(path)])[0], Unit(0, 0, 0, 1 if suffix == "parquet" else 3), "text", "file")
    )
    if suffix == "stream":
        batches = list(read_unit(find_files([str(path)])[0], Unit(0, 0, 0, -1), "text", "file"))
    found = [text for batch in batches for text in batch.texts]
    assert [type(text) for text in found] == [str, LongText, str, LongText]
    assert ["".join(text.blocks()) if isinstance(text, LongText) else text for text in found] == [
        rows[0],
        rows[1],
        rows[4],
        rows[5],
    ]
    assert sum((Counter(batch.drops) for batch in batches), Counter()) == {"missing": 1, "invalid-utf8": 1}


def test_a_parquet_column_named_twice_is_refused(tmp_path: Path) -> None:
    parquet.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "in.parquet"
    )
    with pytest.raises(InputError, match="2 columns of the name 'text'"):
        texts_of(str(tmp_path / "in.parquet"))


def test_a_file_that_shrank_since_the_plan_is_an_error_and_no_silent_end(tmp_path: Path) -> None:
    jsonl(tmp_path / "in.jsonl", ["one", "two", "three"])
    (file,) = find_files([str(tmp_path / "in.jsonl")])
    jsonl(tmp_path / "in.jsonl", ["one", "two"])
    with pytest.raises(InputError, match=r"after line 2: cannot be read \(it had .* when the work was planned"):
        list(read_unit(file, Unit(0, 0, 0, file.bytes), "text", "file"))


@pytest.mark.parametrize("split", ["blank-lines", "lines", "--", "\n\n"])
@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(["a", "b ", "\n", "\r\n", "\n\n", " ", "-", "--", "\t"]), max_size=40).map("".join),
    st.integers(1, 9),
)
def test_a_split_does_not_depend_on_where_the_reads_end(split: str, text: str, size: int) -> None:
    found = []
    for read, longest in ((1 << 20, 1 << 12), (size, 64)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(textual, "READ_BYTES", read)
            patch.setattr(textual, "LONG_SEPARATOR", longest)
            found.append(list(textual._split_stream(io.BytesIO(text.encode()), split)))
    assert found[0] == found[1]


def test_a_file_that_two_patterns_or_a_link_name_again_is_read_once(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        jsonl(tmp_path / f"part_{number}.jsonl", [f"text {number}"])
    (tmp_path / "part_3.jsonl").symlink_to(tmp_path / "part_1.jsonl")
    (tmp_path / "blob").write_bytes((tmp_path / "part_1.jsonl").read_bytes().replace(b"1", b"4"))
    (tmp_path / "part_4.jsonl").symlink_to("blob")
    patterns = [str(tmp_path / "part_*.jsonl"), str(tmp_path / "part_1*"), str(tmp_path / "." / "part_2.jsonl")]
    assert texts_of(patterns) == ["text 1", "text 2", "text 4", "text 10"]


def test_a_folder_stands_for_the_files_of_known_kinds_below_it_also_in_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "b.parquet").mkdir()
    jsonl(tmp_path / "a" / "deep" / "one.jsonl", ["one"])
    (tmp_path / "a" / "notes.pdf").write_text("x")
    parquet_of(pa.string())(tmp_path / "b.parquet" / "part-0.parquet", ["two"])
    jsonl(tmp_path / "c.jsonl", ["three"])
    assert texts_of(str(tmp_path)) == texts_of(str(tmp_path / "*")) == ["one", "two", "three"]


def test_a_name_with_brackets_is_a_name_where_there_is_such_a_file(tmp_path: Path) -> None:
    jsonl(tmp_path / "part[1].jsonl", ["one"])
    assert texts_of(str(tmp_path / "part[1].jsonl")) == ["one"]


REMOTE = (
    *("f_1.jsonl", "f_4.jsonl.gz", "f_5.jsonl.zst", "f_6.txt", "f_7.parquet", "f_11.arrow", "f_14.arrow"),
    *("f_16.json.bz2", "f_17.jl.xz"),
)


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[str]:
    """A remote folder (fsspec, in memory) with files of all kinds."""
    system = fsspec.filesystem("memory")
    for name in REMOTE:
        WRITERS[name][0](tmp_path / name, [words(9, number) for number in range(5)])
        system.pipe_file(f"/argonne-test/{name}", (tmp_path / name).read_bytes())
    yield "memory://argonne-test"
    system.rm("/argonne-test", recursive=True)


def test_remote_files_give_what_local_ones_give(remote: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    options = {"tokenizer": tokenizer_folder, "split": SEPARATOR, "workers": 1}
    far = prepare(PrepareOptions((f"{remote}/f_*",), tmp_path / "far", **options), QUIET)
    near = prepare(PrepareOptions((str(tmp_path / "f_*"),), tmp_path / "near", **options), QUIET)
    assert documents_of(far) == documents_of(near)
    assert open_tokens(far).manifest["sources"][0]["path"] == "memory:///argonne-test/f_1.jsonl"
    assert texts_of(f"{remote}/f_6.txt") == [SEPARATOR.join(words(9, number) for number in range(5))]


@pytest.mark.parametrize(
    "name",
    ["f_4.jsonl.gz", "f_5.jsonl.zst", "f_7.parquet", "f_11.arrow", "f_14.arrow", "f_16.json.bz2", "f_17.jl.xz"],
)
def test_a_remote_file_that_was_cut_is_named(name: str, remote: str) -> None:
    system = fsspec.filesystem("memory")
    whole = system.cat_file(f"/argonne-test/{name}")
    system.pipe_file(f"/argonne-test/{name}", whole[:-20])
    with pytest.raises(InputError, match=re.escape(name)):
        texts_of(f"{remote}/{name}")


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
}


@pytest.mark.parametrize("packed", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".jl", ".json", ".txt", ".md"])
def test_every_kind_of_text_is_found_and_read_packed_in_every_way(kind: str, packed: str, tmp_path: Path) -> None:
    content = line("größe") if kind not in (".txt", ".md") else "größe".encode()
    (tmp_path / f"a{kind.upper()}{packed}").write_bytes(COMPRESS[packed](content[:5]) + COMPRESS[packed](content[5:]))
    assert texts_of(str(tmp_path)) == ["größe"]


@pytest.mark.parametrize("packed", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_packed_file_that_is_cut_or_goes_on_with_something_else_is_an_error(
    name: str, packed: str, tmp_path: Path
) -> None:
    whole = COMPRESS[packed](line(words(400)) + b"\n")
    path = tmp_path / f"{name}{packed}"
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:3], whole + whole[:-1], whole + b"QQ" + whole[2:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{re.escape(path.name)}: .*cannot be read"):
            texts_of(str(path))


@pytest.mark.parametrize("packed", [".bz2", ".xz", ".gz"])
def test_a_packed_file_that_is_mostly_repetition_is_read_in_bounded_memory(packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(COMPRESS[packed](b"word \n" * 8_000_000))
    tracemalloc.start()
    try:
        with textual.open_file(str(path)) as source:
            size = sum(len(part) for part in iter(lambda: source.read(1 << 16), b""))
        assert (size, tracemalloc.get_traced_memory()[1] < 16 << 20) == (48_000_000, True)
    finally:
        tracemalloc.stop()
