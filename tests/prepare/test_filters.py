"""What is kept out of a token set: poor text, repeated documents, text of evaluation files; each counted."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from argonne import files
from argonne.errors import InputError
from argonne.prepare import filters
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.tokens.formats import open_tokens
from argonne.tokens.inspection import inspect_tokens
from argonne.tokens.tokenizer import load_tokenizer
from tests.prepare.helpers import QUIET, documents_of, jsonl
from tests.tokensets import words


def test_the_quality_filter_follows_the_2_0_rule_and_counts(tokenizer_folder: Path, tmp_path: Path) -> None:
    rows = ["1234567890" * 6, "%$#@!" * 20, words(60), "1" * 40, "short"]
    jsonl(tmp_path / "in.jsonl", [{"text": text} for text in rows])
    options = PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder, filter=("quality",))
    manifest = open_tokens(prepare(options, QUIET)).manifest
    assert manifest["drops"] == {"quality": 2, "too-short": 1}
    assert manifest["documents"] == 2


def test_of_equal_documents_the_first_stays_wherever_the_others_lie(tokenizer_folder: Path, tmp_path: Path) -> None:
    texts = [f"{number} {words(20, number)}" for number in range(30)]
    jsonl(tmp_path / "in_1.jsonl", [{"text": text} for text in [*texts[:20], texts[3]]])
    jsonl(tmp_path / "in_2.jsonl", [{"text": text} for text in [*texts[10:], texts[29]]])
    pattern = (str(tmp_path / "in_*.jsonl"),)
    out = prepare(PrepareOptions(pattern, tmp_path / "out", tokenizer_folder, dedup=True, workers=1), QUIET)
    tokenizer = load_tokenizer(tokenizer_folder)
    assert documents_of(out) == [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    manifest = open_tokens(out).manifest
    assert manifest["drops"] == {"duplicate": 12}
    assert [source["drops"] for source in manifest["sources"]] == [{"duplicate": 1}, {"duplicate": 11}]
    assert manifest["rows"] == manifest["documents"] + 12
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert inspect_tokens(out)["problems"] == []
    assert not (out / "parts").exists()


def test_no_document_is_both_held_out_and_trained_on_after_dedup(tokenizer_folder: Path, tmp_path: Path) -> None:
    texts = [words(20, number % 40) for number in range(200)]
    jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    out = prepare(
        PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder, dedup=True, hold_out=0.2),
        QUIET,
    )
    train, held = documents_of(out), documents_of(out, held_out=True)
    assert not {tuple(ids) for ids in train} & {tuple(ids) for ids in held}
    assert len(train) + len(held) == 40


def test_text_of_evaluation_files_is_kept_out_and_counted(tokenizer_folder: Path, tmp_path: Path) -> None:
    question = "Which of the seven wizards mixed forty two potions near the lake before the lazy dog woke up?"
    jsonl(tmp_path / "eval.jsonl", [{"q": {"text": question}, "choices": ["a", "b"]}])
    (tmp_path / "eval.csv").write_text(
        'id,"one two three four five six seven eight nine ten eleven twelve thirteen fourteen"\n'
    )
    rows = [
        words(50),
        f"{words(9)} {question.upper()} {words(9)}",
        f"{question[:60]} {words(30)}",
        "so: one two three four five six seven eight nine ten eleven twelve thirteen!",
    ]
    jsonl(tmp_path / "in.jsonl", [{"text": text} for text in rows])
    options = PrepareOptions(
        (str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder, decontaminate=(str(tmp_path / "eval.*"),)
    )
    manifest = open_tokens(prepare(options, QUIET)).manifest
    assert manifest["drops"] == {"contaminated": 2}
    assert manifest["documents"] == 2
    listed = {Path(file["path"]).name: file["sha256"] for file in manifest["evaluation_files"]}
    assert listed == {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("eval.csv", "eval.jsonl")
    }


def test_evaluation_files_that_changed_since_the_work_began_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    for number in range(2):
        jsonl(tmp_path / f"in_{number}.jsonl", [{"text": words(50, number)}])
    jsonl(tmp_path / "eval.jsonl", [{"q": text}])
    evaluation = (str(tmp_path / "eval.jsonl"),)
    options = PrepareOptions((str(tmp_path / "in_*"),), tmp_path / "out", tokenizer_folder, decontaminate=evaluation)
    prepare(dataclasses.replace(options, part=(1, 2)), QUIET)
    jsonl(tmp_path / "eval.jsonl", [{"q": f"{text} fourteen"}])
    with pytest.raises(InputError, match="the --decontaminate files have changed"):
        prepare(options, QUIET)
    jsonl(tmp_path / "eval.jsonl", [{"q": text}])
    assert prepare(options, QUIET) == tmp_path / "out"


SHORT = "How many eggs do the sixteen ducks lay per day?"
CHINESE = "中国的首都是哪里？请从以下选项中选择一个最合适的答案，并说明你选择这个答案的理由和依据是什么"


def evaluated(folder: Path, tokenizer: Path) -> PrepareOptions:
    """Documents with evaluation texts of every length in them."""
    asked = [" ".join(f"w{number}" for number in range(14)), SHORT, CHINESE, "What is the capital of France?"]
    jsonl(folder / "eval.jsonl", [{"q": text, "a": "Paris"} for text in asked])
    for number, text in enumerate([*asked, words(30, 7)]):
        jsonl(folder / f"in_{number}.jsonl", [{"text": f"so: {text} {words(9, 5)}"}])
    return PrepareOptions(
        (str(folder / "in_*"),), folder / "out", tokenizer, decontaminate=(str(folder / "eval.jsonl"),), workers=1
    )


def test_short_texts_and_texts_without_spaces_are_looked_for_and_what_is_not_is_said_at_every_start(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = evaluated(tmp_path, tokenizer_folder)
    line = (
        "decontamination: 8 evaluation texts in 1 files: 1 by 13 words, 1 by fewer, 1 by characters, 5 too short to be "
        "looked for (first: 'Paris')\n"
    )
    for part in ((1, 2), (2, 2)):
        prepare(dataclasses.replace(options, part=part))
        assert line in capsys.readouterr().err
    manifest = open_tokens(tmp_path / "out").manifest
    assert (manifest["drops"], manifest["documents"]) == ({"contaminated": 3}, 2)
    assert manifest["recipe"]["decontaminate_rule"] == 2


def test_work_that_an_earlier_version_began_is_finished_by_its_rule(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = evaluated(tmp_path, tokenizer_folder)
    prepare(dataclasses.replace(options, part=(5, 5)), QUIET)
    plan = files.read_json(tmp_path / "out" / "plan.json")
    del plan["recipe"]["decontaminate_rule"]
    files.write_json(tmp_path / "out" / "plan.json", plan)
    manifest = open_tokens(prepare(options)).manifest
    assert "1 by 13 words, 0 by fewer, 0 by characters, 7 too short" in capsys.readouterr().err
    assert (manifest["drops"], manifest["documents"]) == ({"contaminated": 1}, 4)
    assert prepare(options, QUIET) == tmp_path / "out"


def test_the_documents_of_the_case_are_found(tokenizer_folder: Path, tmp_path: Path, shared: Path) -> None:
    case = shared / "cases" / "short_eval"
    options = PrepareOptions(
        (str(case / "dec.jsonl"),), tmp_path / "out", tokenizer_folder, decontaminate=(str(case / "ev.jsonl"),)
    )
    assert open_tokens(prepare(options, QUIET)).manifest["drops"] == {"contaminated": 2}


def evaluation_table(path: Path) -> str:
    """Three batches of rows at `path`, a parquet file, an Arrow file or a stream; returns a text of the last one."""
    texts = [f"{words(20, number)} {number}" for number in range(3)]
    table = pa.table({"id": [0, 1, 2], "row": [{"question": text} for text in texts]})
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=1)
        return texts[-1]
    make = pa.ipc.new_stream if path.name == "stream.arrow" else pa.ipc.new_file
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return texts[-1]


@pytest.mark.parametrize("name", ["table.parquet", "file.arrow", "stream.arrow"])
def test_tables_of_evaluation_text_are_read_to_their_last_row(name: str, tmp_path: Path) -> None:
    text = evaluation_table(tmp_path / name)
    found = filters.build({"filter": [], "decontaminate": ["yes"]}, filters.evaluation_files([str(tmp_path / name)]))
    assert found["contaminated"](f"so it says: {text}")
    assert not found["contaminated"](words(60, 7))


@pytest.mark.parametrize("name", ["table.parquet", "file.arrow", "stream.arrow"])
def test_a_table_of_evaluation_text_that_was_cut_off_is_refused(name: str, tmp_path: Path) -> None:
    evaluation_table(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    stream_end = 8  # without it every batch can still be read, and nothing tells that there were no more
    (tmp_path / name).write_bytes(content[:-stream_end])
    with pytest.raises(InputError, match=rf"^--decontaminate .*{name}: cannot be read .*; restore it or leave it out$"):
        filters.build({"filter": [], "decontaminate": ["yes"]}, filters.evaluation_files([str(tmp_path / name)]))


def test_an_evaluation_file_with_a_value_that_python_has_none_for_is_named(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    jsonl(tmp_path / "in.jsonl", [{"text": words(30, 1)}])
    late = pa.array([3_000_000], pa.date32())  # in the year 10,183
    parquet.write_table(pa.table({"question": [words(20, 2)], "day": late}), tmp_path / "ev.parquet")
    options = PrepareOptions(
        (str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder, decontaminate=(str(tmp_path / "ev.parquet"),)
    )
    with pytest.raises(
        InputError, match=r"--decontaminate .*ev.parquet: cannot be read .*; restore it or leave it out"
    ):
        prepare(options, QUIET)
