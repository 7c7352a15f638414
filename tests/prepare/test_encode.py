"""A unit of text to ids: long documents in pieces, long units in several shards, nothing changed by either."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from argonne.prepare import encode
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.tokens.formats import open_tokens
from argonne.tokens.tokenizer import load_tokenizer
from tests.prepare.helpers import QUIET, documents_of, jsonl, long_text
from tests.tokensets import words


def test_a_long_unit_is_written_as_several_shards_cut_between_documents(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "in.jsonl", [{"text": words(20, number)} for number in range(40)])
    whole = prepare(PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "whole", tokenizer_folder), QUIET)
    monkeypatch.setattr(
        encode.Job,
        "__init__",
        lambda self, out, encoder="auto": self.__dict__.update(out=out, encoder=encoder, shard_tokens=200),
    )
    out = prepare(PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder, workers=1), QUIET)
    shards = open_tokens(out).train.shards
    assert len(shards) > 5
    assert max(shard.tokens for shard in shards) <= 200
    assert documents_of(out) == documents_of(whole)


def test_bos_begins_each_document_only_where_asked(tmp_path: Path) -> None:
    jsonl(tmp_path / "in.jsonl", [{"text": words(40, number)} for number in range(40)])
    options = PrepareOptions(
        (str(tmp_path / "in.jsonl"),), tmp_path / "out", None, train_tokenizer=300, bare=True, bos=True
    )
    out = prepare(options, QUIET)
    tokenizer = load_tokenizer(out / "tokenizer")
    assert all(document[0] == tokenizer.bos_id and document[-1] == tokenizer.eos_id for document in documents_of(out))
    assert tokenizer.vocab_size == 300


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_document_of_megabytes_is_encoded_in_pieces_with_the_ids_of_the_whole(
    tokenizer_folder: Path, tmp_path: Path, suffix: str
) -> None:
    text = long_text(1_800_000)
    if suffix == "txt":
        (tmp_path / "in.txt").write_text(text)
    elif suffix == "jsonl":
        jsonl(tmp_path / "in.jsonl", [{"text": "before"}, {"text": text}, {"text": "after"}])
    else:
        parquet.write_table(pa.table({"text": ["before", text, "after"]}), tmp_path / "in.parquet")
    out = prepare(
        PrepareOptions((str(tmp_path / f"in.{suffix}"),), tmp_path / "out", tokenizer_folder, workers=1), QUIET
    )
    tokenizer = load_tokenizer(tokenizer_folder)
    around = [] if suffix == "txt" else ["before", "after"]
    expected = [text] if suffix == "txt" else ["before", text, "after"]
    found = documents_of(out)
    assert found == [[*tokenizer.encode(part), tokenizer.eos_id] for part in expected]
    assert open_tokens(out).manifest["text_bytes"] == len(text.encode()) + sum(map(len, around))


def test_text_without_a_safe_cut_is_encoded_whole(tokenizer_folder: Path, tmp_path: Path) -> None:
    text = "word " * 400_000
    (tmp_path / "in.txt").write_text(text)
    out = prepare(PrepareOptions((str(tmp_path / "in.txt"),), tmp_path / "out", tokenizer_folder, workers=1), QUIET)
    tokenizer = load_tokenizer(tokenizer_folder)
    assert documents_of(out) == [[*tokenizer.encode(text), tokenizer.eos_id]]
