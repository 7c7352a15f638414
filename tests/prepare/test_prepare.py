"""Text to token sets: every row accounted for, the same bytes however the work was done."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from argonne.errors import InputError
from argonne.prepare import encode, engines
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.tokens.formats import open_tokens
from argonne.tokens.inspection import inspect_tokens
from argonne.tokens.tokenizer import load_tokenizer
from tests.prepare.helpers import QUIET, content, documents_of, jsonl
from tests.tokensets import words


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, list[str]]:
    """Files of all formats in a folder, and their texts in natural order."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [words(30 + number, number) for number in range(60)]
    jsonl(folder / "part_2.jsonl", [{"text": text, "id": 1} for text in texts[:20]])
    (folder / "part_3.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts[20:25]).encode())
    )
    (folder / "part_4.jsonl.zst").write_bytes(
        zstandard.compress(
            "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[25:30]).encode()
        )
    )
    parquet.write_table(
        pa.table({"n": list(range(15)), "text": texts[30:45]}), folder / "part_10.parquet", row_group_size=4
    )
    with (
        pa.OSFile(str(folder / "part_11.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, pa.schema([("text", pa.string())])) as writer,
    ):
        writer.write_table(pa.table({"text": texts[45:50]}))
    with (
        pa.OSFile(str(folder / "part_12.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, pa.schema([("text", pa.large_string())])) as writer,
    ):
        writer.write_table(pa.table({"text": pa.array(texts[50:59], pa.large_string())}), max_chunksize=2)
    (folder / "part_20.txt").write_text(texts[59])
    return folder, texts


def test_every_format_gives_its_documents_in_natural_order_with_reference_ids(
    corpus: tuple[Path, list[str]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, texts = corpus
    out = prepare(PrepareOptions((str(folder / "*"),), tmp_path / "out", tokenizer_folder, workers=1), QUIET)
    tokenizer = load_tokenizer(tokenizer_folder)
    assert documents_of(out) == [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    manifest = open_tokens(out).manifest
    assert manifest["rows"] == manifest["documents"] == 60
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert [Path(source["path"]).name for source in manifest["sources"]] == [
        f"part_{n}" for n in ("2.jsonl", "3.jsonl.gz", "4.jsonl.zst", "10.parquet", "11.arrow", "12.arrow", "20.txt")
    ]
    assert inspect_tokens(out)["problems"] == []


def test_one_and_two_workers_write_the_same_bytes(
    corpus: tuple[Path, list[str]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, _ = corpus
    found = [
        content(
            prepare(
                PrepareOptions(
                    (str(folder / "*"),), tmp_path / f"out{workers}", tokenizer_folder, workers=workers, hold_out=0.1
                ),
                QUIET,
            )
        )
        for workers in (1, 2)
    ]
    assert found[0] == found[1]


def test_parts_in_any_order_write_the_same_bytes_as_one_run(
    corpus: tuple[Path, list[str]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, _ = corpus
    whole = prepare(PrepareOptions((str(folder / "*"),), tmp_path / "whole", tokenizer_folder, workers=1), QUIET)
    for part in (3, 1, 2):
        assert not (tmp_path / "parts" / "manifest.json").exists()
        prepare(
            PrepareOptions((str(folder / "*"),), tmp_path / "parts", tokenizer_folder, workers=1, part=(part, 3)), QUIET
        )
    assert content(tmp_path / "parts") == content(whole)


def test_work_that_was_interrupted_goes_on_and_ends_in_the_same_bytes(
    corpus: tuple[Path, list[str]], tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = corpus
    options = PrepareOptions((str(folder / "*"),), tmp_path / "out", tokenizer_folder, workers=1)
    whole = content(
        prepare(PrepareOptions((str(folder / "*"),), tmp_path / "whole", tokenizer_folder, workers=1), QUIET)
    )
    done: list[int] = []
    run = encode.encode_unit

    def interrupted(job: encode.Job, number: int) -> dict[str, Any]:
        if len(done) % 3 == 2:
            done.append(-1)
            (tmp_path / "out" / f".tmp-tokens-{number:05d}.bin-99").write_bytes(b"half")
            (tmp_path / "out" / "units").mkdir(exist_ok=True)
            (tmp_path / "out" / "units" / f".tmp-{number:05d}.json-99").write_bytes(b"{")
            raise KeyboardInterrupt
        done.append(number)
        return run(job, number)

    monkeypatch.setattr(encode, "encode_unit", interrupted)
    for _ in range(20):
        try:
            prepare(options, QUIET)
            break
        except KeyboardInterrupt:
            continue
    units = [number for number in done if number >= 0]
    assert units == sorted(set(units))
    assert done.count(-1) >= 2
    assert content(tmp_path / "out") == whole
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert prepare(options, QUIET) == tmp_path / "out"
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before


def test_parquet_values_that_are_not_utf8_null_or_empty_are_counted(tokenizer_folder: Path, tmp_path: Path) -> None:
    texts = pa.array([b"good", b"bad \xff", None, b"", "größe".encode()], pa.binary())
    for name, kind in (("a", pa.string()), ("b", pa.large_string())):
        column = pa.Array.from_buffers(kind, 5, (texts if name == "a" else texts.cast(pa.large_binary())).buffers())
        parquet.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
    options = PrepareOptions((str(tmp_path / "*.parquet"),), tmp_path / "out", tokenizer_folder, max_drop_fraction=1)
    manifest = open_tokens(prepare(options, QUIET)).manifest
    assert manifest["drops"] == {"empty": 2, "invalid-utf8": 2, "missing": 2}
    assert manifest["rows"] == 10


def test_every_row_is_a_document_or_a_counted_drop(tokenizer_folder: Path, tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "good"}).encode(),
        b"",
        json.dumps({"text": ""}).encode(),
        json.dumps({"other": "x"}).encode(),
        json.dumps({"text": None}).encode(),
        json.dumps({"text": 7}).encode(),
        b"{broken",
        b'["a list"]',
        b'{"text": "bad \xff byte"}',
        b'{"text": "lone \\ud800 half"}',
        json.dumps({"text": "a nul \0 is text"}).encode(),
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    out = prepare(
        PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder, max_drop_fraction=1.0), QUIET
    )
    manifest = open_tokens(out).manifest
    assert manifest["drops"] == {"empty": 1, "invalid-json": 2, "invalid-utf8": 2, "missing": 2, "not-text": 1}
    assert manifest["rows"] == manifest["documents"] + sum(manifest["drops"].values()) == 10
    assert load_tokenizer(tokenizer_folder).decode(documents_of(out)[1][:-1]) == "a nul \0 is text"


def test_too_many_rows_that_are_no_documents_stop_the_work_and_a_higher_limit_finishes_it(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    jsonl(tmp_path / "in.jsonl", [{"text": "good"}, {"text": 1}])
    with pytest.raises(InputError, match=r"1 of 2 rows are no documents \(not-text 1\)"):
        prepare(PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder), QUIET)
    with pytest.raises(InputError, match="was interrupted here: run it again"):
        open_tokens(tmp_path / "out")
    out = prepare(
        PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder, max_drop_fraction=0.5), QUIET
    )
    assert open_tokens(out).documents == 1


def test_held_out_documents_are_about_the_asked_share_and_none_is_in_both_parts(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    jsonl(tmp_path / "in.jsonl", [{"text": f"{number} {words(8, number)}"} for number in range(200)])
    out = prepare(
        PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder, hold_out=0.05), QUIET
    )
    train, held = documents_of(out), documents_of(out, held_out=True)
    assert 5 <= len(held) <= 17  # of 200 documents 5 %: 10, and three standard deviations of 3.1
    assert len(train) + len(held) == 200
    everything = {tuple(ids) for ids in [*train, *held]}
    assert len(everything) == 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": ("nowhere/*.jsonl",)}, "matches no file"),
        ({"text_column": "body"}, "no column 'body'; it has n, text"),
        ({"text_column": "n"}, "column 'n' holds int64, expected text"),
        ({"tokenizer": None}, "exactly one of --tokenizer"),
        ({"tokenizer": Path("nowhere")}, "no such folder"),
        ({"hold_out": 1.0}, "--hold-out"),
        ({"filter": ("nice",)}, "--filter"),
        ({"engine": "abacus"}, "--engine"),
        ({"part": (3, 2)}, "--part"),
        ({"train_tokenizer": 100, "tokenizer": None}, "expected at least 283"),
    ],
)
def test_wrong_input_is_named_with_what_was_expected(
    tokenizer_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    parquet.write_table(pa.table({"n": [1], "text": ["some text"]}), tmp_path / "in.parquet")
    given: dict[str, Any] = {
        "input": (str(tmp_path / "in.parquet"),),
        "out": tmp_path / "out",
        "tokenizer": tokenizer_folder,
        **changes,
    }
    with pytest.raises(InputError, match=message):
        prepare(PrepareOptions(**given), QUIET)


def test_an_output_folder_that_holds_something_else_is_left_alone(tokenizer_folder: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "in.jsonl", [{"text": "some text"}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="holds no plan"):
        prepare(PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder), QUIET)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_other_options_on_finished_or_unfinished_work_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "in.jsonl", [{"text": "some text"}, {"text": "more text"}])
    base = PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder)
    prepare(base, QUIET)
    with pytest.raises(InputError, match=r"finished token set made with other options \(hold_out\)"):
        prepare(PrepareOptions(base.input, base.out, tokenizer_folder, hold_out=0.5), QUIET)
    prepare(PrepareOptions(base.input, tmp_path / "half", tokenizer_folder, part=(2, 2)), QUIET)
    with pytest.raises(InputError, match=r"unfinished work with other options \(hold_out\)"):
        prepare(PrepareOptions(base.input, tmp_path / "half", tokenizer_folder, hold_out=0.5), QUIET)
    jsonl(tmp_path / "in.jsonl", [{"text": "some text"}])
    with pytest.raises(InputError, match=r"has come, gone or changed in size since the work began"):
        prepare(PrepareOptions(base.input, tmp_path / "half", tokenizer_folder), QUIET)


def test_a_damaged_parquet_is_an_error_or_is_skipped_and_listed(tokenizer_folder: Path, tmp_path: Path) -> None:
    table = pa.table({"text": [words(50, number) for number in range(50)]})
    parquet.write_table(table, tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    pattern = (str(tmp_path / "*.parquet"),)
    with pytest.raises(InputError, match=r"b\.parquet: not a readable parquet file"):
        prepare(PrepareOptions(pattern, tmp_path / "out", tokenizer_folder), QUIET)
    out = prepare(PrepareOptions(pattern, tmp_path / "out", tokenizer_folder, skip_bad_shards=True), QUIET)
    manifest = open_tokens(out).manifest
    assert manifest["documents"] == 50
    assert [Path(bad["path"]).name for bad in manifest["bad_files"]] == ["b.parquet"]


def test_a_file_that_ends_in_the_middle_is_an_error_or_is_listed_with_what_could_be_read(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    rows = "".join(
        json.dumps({"text": f"{words(30, n)} {generator.integers(10**15)}"}) + "\n" for n in range(3000)
    ).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows)[:-20000])
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "whole"}) + "\n")
    pattern = (str(tmp_path / "*.jsonl*"),)
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: after line [\d,]+: cannot be read"):
        prepare(PrepareOptions(pattern, tmp_path / "out", tokenizer_folder, workers=1), QUIET)
    out = prepare(PrepareOptions(pattern, tmp_path / "kept", tokenizer_folder, workers=1, skip_bad_shards=True), QUIET)
    manifest = open_tokens(out).manifest
    assert 100 < manifest["documents"] < 3001
    assert [Path(bad["path"]).name for bad in manifest["bad_files"]] == ["a.jsonl.gz"]


def test_two_writers_of_one_folder_are_not_let_in_together(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "in.jsonl", [{"text": "some text"}])
    options = PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder)

    def intrude(*_: Any) -> Any:
        with pytest.raises(InputError, match="another `argonne prepare` is writing"):
            prepare(options, QUIET)
        yield from ()

    with monkeypatch.context() as patch:
        patch.setattr(engines, "run", intrude)
        with pytest.raises(KeyError):
            prepare(options, QUIET)
    prepare(options, QUIET)


def test_a_single_train_bin_holds_the_same_tokens_as_the_shards(
    corpus: tuple[Path, list[str]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, _ = corpus
    shards = prepare(
        PrepareOptions((str(folder / "*"),), tmp_path / "shards", tokenizer_folder, workers=1, hold_out=0.1), QUIET
    )
    single = prepare(
        PrepareOptions(
            (str(folder / "*"),), tmp_path / "single", tokenizer_folder, workers=1, hold_out=0.1, format="train.bin"
        ),
        QUIET,
    )
    assert sorted(path.name for path in single.iterdir() if path.suffix == ".bin") == ["held_out.bin", "train.bin"]
    assert documents_of(single) == documents_of(shards)
    assert documents_of(single, held_out=True) == documents_of(shards, held_out=True)
    assert inspect_tokens(single)["problems"] == []
    alone = open_tokens(single / "train.bin")
    assert alone.tokens == open_tokens(shards).tokens


@pytest.mark.parametrize(
    ("split", "expected"),
    [("blank-lines", ["a\nb", "c", "d"]), ("lines", ["a", "b", "c", " ", "d"]), ("c", ["a\nb\n\n", "\n\n \n\nd\n"])],
)
def test_plain_text_is_split_as_asked(tokenizer_folder: Path, tmp_path: Path, split: str, expected: list[str]) -> None:
    (tmp_path / "in.txt").write_text("a\nb\n\nc\n\n \n\nd\n")
    out = prepare(
        PrepareOptions(
            (str(tmp_path / "in.txt"),), tmp_path / "out", tokenizer_folder, split=split, max_drop_fraction=1
        ),
        QUIET,
    )
    tokenizer = load_tokenizer(tokenizer_folder)
    assert [tokenizer.decode(ids[:-1]) for ids in documents_of(out)] == expected


def test_jsonl_cut_into_many_units_gives_every_line_once(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [words(1 + number % 50, number) for number in range(300)]
    jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    monkeypatch.setattr("argonne.prepare.documents.unit_bytes", lambda _: 997)
    out = prepare(PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder, workers=1), QUIET)
    tokenizer = load_tokenizer(tokenizer_folder)
    assert len(open_tokens(out).train.shards) > 50
    assert documents_of(out) == [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
