"""How input is cut into units, and what a finished set says when it is asked for again."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from argonne.cli import main
from argonne.errors import InputError
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.tokens import manifest as manifests
from argonne.tokens.formats import open_tokens
from argonne.tokens.inspection import inspect_tokens
from argonne.tokens.tokenizer import load_tokenizer
from tests.prepare.helpers import QUIET, arguments, documents_of, jsonl, refusal
from tests.tokensets import words


@pytest.fixture
def many(tmp_path: Path) -> tuple[str, list[str]]:
    """(folder of 200 small files of several kinds, their texts in order)."""
    folder, texts = tmp_path / "many", []
    folder.mkdir()
    for number in range(200):
        own = [f"{number} {words(10, 3 * number + part)}" for part in range(1 + number % 3)]
        if number % 3 == 0:
            (folder / f"f_{number}.txt").write_text(own[0])
        else:
            jsonl(folder / f"f_{number}.jsonl", [{"text": text} for text in own])
        texts += own
    return str(folder), texts


def test_small_files_share_units_and_shards_and_each_is_accounted_for(
    many: tuple[str, list[str]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, texts = many
    out = prepare(PrepareOptions((folder,), tmp_path / "out", tokenizer_folder, workers=1), QUIET)
    opened, tokenizer = open_tokens(out), load_tokenizer(tokenizer_folder)
    assert len(opened.train.shards) == 1
    assert documents_of(out) == [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    for number, source in enumerate(opened.manifest["sources"]):
        own = [text for text in texts if text.startswith(f"{number} ")]
        assert Path(source["path"]).stem == f"f_{number}"
        assert (source["rows"], source["documents"], source["drops"]) == (len(own), len(own), {})
        assert source["text_bytes"] == sum(len(text.encode()) for text in own)
        assert source["tokens"] == sum(len(tokenizer.encode(text)) + 1 for text in own)


def test_drops_of_files_that_share_a_unit_are_counted_for_their_own_file(
    many: tuple[str, list[str]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, texts = many
    jsonl(Path(folder) / "f_7.jsonl", [{"text": texts[0]}, {"text": ""}, {"other": 1}, {"text": "its own text"}])
    (Path(folder) / "f_100.jsonl").write_bytes(b"\xff\n")
    out = prepare(
        PrepareOptions((folder,), tmp_path / "out", tokenizer_folder, dedup=True, hold_out=0.1, workers=1), QUIET
    )
    manifest = open_tokens(out).manifest
    drops = {Path(source["path"]).name: source["drops"] for source in manifest["sources"] if source["drops"]}
    assert drops == {
        "f_7.jsonl": {"duplicate": 1, "empty": 1, "missing": 1},
        "f_100.jsonl": {"invalid-utf8": 1},
    }
    for totals in (manifest, *manifest["sources"]):
        kept = totals["documents"] + totals["held_out_documents"]
        assert totals["rows"] == kept + sum(totals["drops"].values())
    for name in ("rows", "documents", "tokens", "text_bytes", "held_out_documents"):
        assert manifest[name] == sum(source[name] for source in manifest["sources"])


def test_a_file_that_cannot_be_read_leaves_the_others_of_its_unit(
    many: tuple[str, list[str]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, texts = many
    rows = "".join(json.dumps({"text": words(9, number)}) + "\n" for number in range(50))
    (Path(folder) / "f_0.jsonl.gz").write_bytes(gzip.compress(rows.encode())[:-30])
    options = PrepareOptions((folder,), tmp_path / "out", tokenizer_folder, workers=1)
    with pytest.raises(InputError, match=r"f_0.jsonl.gz: after line \d+: cannot be read"):
        prepare(options, QUIET)
    out = prepare(replace(options, out=tmp_path / "other", skip_bad_shards=True), QUIET)
    manifest = open_tokens(out).manifest
    assert [Path(bad["path"]).name for bad in manifest["bad_files"]] == ["f_0.jsonl.gz"]
    assert manifest["sources"][0]["rows"] == manifest["documents"] - len(texts)


def test_sources_past_a_thousand_stand_in_a_file_of_their_own(
    many: tuple[str, list[str]], tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PrepareOptions((many[0],), tmp_path / "out", tokenizer_folder, workers=1)
    inline = open_tokens(prepare(options, QUIET)).manifest["sources"]
    monkeypatch.setattr(manifests, "SOURCES_IN_MANIFEST", 100)
    out = prepare(PrepareOptions((many[0],), tmp_path / "other", tokenizer_folder, workers=1), QUIET)
    manifest = open_tokens(out).manifest
    assert manifest["sources"] == []
    assert manifest["sources_file"] == {"file": "sources.jsonl", "sources": 200}
    assert list(manifests.sources_of(out, manifest)) == inline
    assert inspect_tokens(out)["problems"] == []
    (out / "sources.jsonl").write_text("")
    assert "sources.jsonl" in inspect_tokens(out)["problems"][0]


def test_a_finished_set_whose_input_has_changed_says_so(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        jsonl(tmp_path / f"in_{number}.jsonl", [{"text": words(10, number)}])
    command = arguments(tmp_path / "in_*.jsonl", tokenizer_folder, tmp_path / "out")
    assert main(command) == 0
    (tmp_path / "in_1.jsonl").rename(tmp_path / "gone")
    assert main(command) == 0  # what it was made from may be gone
    jsonl(tmp_path / "in_3.jsonl", [{"text": "new"}])
    assert "in_3.jsonl came or changed since it was made" in refusal(command, capsys)
    jsonl(tmp_path / "in_2.jsonl", [{"text": "other"}])
    assert "in_2.jsonl and 1 more files came or changed" in refusal(command, capsys)
