"""What is held out: by the hash of the text alone; of few documents the end of each."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne import files, layout
from argonne.cli import main
from argonne.prepare import documents, hold_out
from argonne.prepare.assemble import text_hash
from argonne.prepare.options import PrepareOptions
from argonne.prepare.planning import open_plan
from argonne.prepare.prepare import prepare
from argonne.prepare.texts import LongText
from argonne.tokens.formats import open_tokens
from argonne.tokens.tokenizer import load_tokenizer
from tests.prepare.helpers import QUIET, arguments, documents_of, jsonl
from tests.tokensets import words

TEXTS = [f"{number} {words(8, number)}" for number in range(300)]


def sides(folder: Path) -> dict[tuple[int, ...], str]:
    """The side of each document. A document on both sides fails here."""
    train, held = ({tuple(ids) for ids in documents_of(folder, held_out=side)} for side in (False, True))
    assert not train & held
    return dict.fromkeys(train, "train") | dict.fromkeys(held, "held out")


def test_equal_texts_fall_on_one_side_in_every_set(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = []
    for seed in range(3):
        chosen = random.Random(seed).choices(TEXTS, k=400)  # some of them twice
        monkeypatch.setattr(documents, "unit_bytes", lambda _, size=(3_000, 100_000, 1 << 20)[seed]: size)
        name = tmp_path / f"in_{seed}.{'parquet' if seed == 2 else 'jsonl'}"
        if seed == 2:
            parquet.write_table(pa.table({"text": chosen}), name)
        else:
            jsonl(name, [{"text": text} for text in chosen])
        options = PrepareOptions(
            (str(name),), tmp_path / f"out_{seed}", tokenizer_folder, hold_out=0.1, dedup=seed == 1, workers=1
        )
        sets.append(sides(prepare(options, QUIET)))
    for one in sets:
        assert 0.05 < list(one.values()).count("held out") / len(one) < 0.17
        for other in sets:
            assert all(one[ids] == other[ids] for ids in one.keys() & other.keys())


@given(st.text(min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_what_a_share_holds_out_a_larger_one_does_too(text: str, one: float, other: float) -> None:
    low = np.array([text_hash(text.encode(errors="replace"))[0]], dtype=np.uint64)
    assert bool(hold_out.falls_out(low, min(one, other))[0]) <= bool(hold_out.falls_out(low, max(one, other))[0])


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.floats(0.01, 0.9))
def test_a_cut_text_is_both_its_parts_and_the_same_however_it_is_held(text: str, share: float) -> None:
    begin, end = hold_out.cut(text, share)
    assert begin + (end or "") == text
    assert begin
    long_begin, long_end = hold_out.cut(LongText(text.encode()), share)
    assert bytes(long_begin.data).decode() == begin
    assert (bytes(long_end.data).decode() if long_end else None) == end


def test_the_end_of_a_text_begins_with_a_line_and_is_about_the_share() -> None:
    text = "\n".join(words(10, number).replace("\n", " ") for number in range(200))
    begin, end = hold_out.cut(text, 0.1)
    assert end is not None
    assert begin.endswith("\n")
    assert 0.1 <= len(end.encode()) / len(text.encode()) <= 0.2


@pytest.mark.parametrize("dedup", [False, True])
def test_of_few_documents_the_end_of_each_is_held_out_and_every_row_is_accounted_for(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dedup: bool
) -> None:
    texts = [words(400, number) for number in (1, 2, 3, 1)]
    jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    more = ["--hold-out", "0.1", *(["--dedup"] if dedup else [])]
    assert main(arguments(tmp_path / "in.jsonl", tokenizer_folder, tmp_path / "out", *more)) == 0
    kept = texts[:3] if dedup else texts
    counted = "4 rows = 3 documents + 1 dropped (duplicate 1)" if dedup else "4 rows = 4 documents + 0 dropped"
    assert f"{counted}; of {len(kept)} of them the last 10 % are held out" in capsys.readouterr().err
    tokenizer = load_tokenizer(tokenizer_folder)
    cuts = [hold_out.cut(text, 0.1) for text in kept]
    for held, wanted in ((False, [begin for begin, _ in cuts]), (True, [end for _, end in cuts])):
        assert documents_of(tmp_path / "out", held_out=held) == [
            [*tokenizer.encode(text or ""), tokenizer.eos_id] for text in wanted
        ]
    manifest = open_tokens(tmp_path / "out").manifest
    assert manifest["held_out"]["rule"] == "cut"
    assert sum(source["documents"] for source in manifest["sources"]) == len(kept)


def test_a_long_document_is_cut_as_a_short_one_is(tokenizer_folder: Path, tmp_path: Path) -> None:
    text = "\n".join(words(40, number) for number in range(9000))
    (tmp_path / "in.txt").write_text(text)
    out = prepare(PrepareOptions((str(tmp_path / "in.txt"),), tmp_path / "out", tokenizer_folder, hold_out=0.01), QUIET)
    begin, end = hold_out.cut(text, 0.01)
    manifest = open_tokens(out).manifest
    assert manifest["text_bytes"] == len(begin.encode()) > 1 << 20
    assert manifest["held_out"]["text_bytes"] == len((end or "").encode())
    tokenizer = load_tokenizer(tokenizer_folder)
    assert documents_of(out, held_out=True) == [[*tokenizer.encode(end or ""), tokenizer.eos_id]]


def test_work_that_an_earlier_version_began_ends_by_its_rule(tokenizer_folder: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    options = PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder, hold_out=0.05)
    plan = open_plan(options, tmp_path / "out")
    assert plan is not None
    for unit in plan["units"]:
        del unit["files"]
    del plan["hold_out_rule"]
    files.write_json(tmp_path / "out" / layout.UNITS_PLAN, {**plan, "format_version": 1})
    out = prepare(options, QUIET)
    tokenizer = load_tokenizer(tokenizer_folder)
    held = [text for text, out_of_it in zip(TEXTS, hold_out.places(0.05, 0), strict=False) if out_of_it]
    assert len(held) == 15
    assert documents_of(out, held_out=True) == [[*tokenizer.encode(text), tokenizer.eos_id] for text in held]
    assert open_tokens(out).manifest["held_out"]["rule"] == "position"
    assert json.loads((out / "manifest.json").read_text())["documents"] == 285
