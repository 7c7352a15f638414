"""Bad input through the real command line: exit code 2 and one message that names the file, the row
and the next step.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from argonne.cli import main
from argonne.tokens import shards as token_files
from argonne.tokens.formats import open_tokens
from argonne.tokens.writer import ShardWriter
from tests.prepare.helpers import LINES, TEXTS, arguments, content, refusal

Build = Callable[[Path], Path | str]


def file(name: str, content: bytes) -> Build:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return build


def table(column: Any, *, name: str = "text", cut: float = 1.0, flip: bool = False) -> Build:
    def build(folder: Path) -> Path:
        path = folder / "in.parquet"
        parquet.write_table(pa.table({name: column}), path, row_group_size=100, compression="snappy")
        whole = bytearray(path.read_bytes())
        if flip:
            start = parquet.ParquetFile(path).metadata.row_group(2).column(0).dictionary_page_offset
            whole[start : start + 400] = bytes(400)
        path.write_bytes(whole[: int(len(whole) * cut)])
        return path

    return build


def arrow(random_access: bool, keep: Callable[[bytes], bytes]) -> Build:
    def build(folder: Path) -> Path:
        path, schema = folder / "in.arrow", pa.schema([("text", pa.string())])
        with (
            pa.OSFile(str(path), "wb") as sink,
            (pa.ipc.new_file if random_access else pa.ipc.new_stream)(sink, schema) as writer,
        ):
            writer.write_table(pa.table({"text": TEXTS}), max_chunksize=100)
        path.write_bytes(keep(path.read_bytes()))
        return path

    return build


def moved_offset(content: bytes) -> bytes:
    """The 50th offset of the first record batch points far outside."""
    offsets = np.cumsum([0, *(len(text.encode()) for text in TEXTS[:100])]).astype("<i4").tobytes()
    place = content.index(offsets) + 4 * 50
    return content[:place] + struct.pack("<i", 1 << 30) + content[place + 4 :]


def folder_with(name: str, *inside: str) -> Build:
    def build(folder: Path) -> Path:
        (folder / name).mkdir()
        for item in inside:
            (folder / name / item).write_text("x")
        return folder / name

    return build


FILES: dict[str, tuple[Build, list[str]]] = {
    "parquet cut in two": (
        table(TEXTS, cut=0.5),
        ["in.parquet: not a readable parquet file", "restore it", "--skip-bad-shards"],
    ),
    "parquet with damaged pages": (
        table(TEXTS, flip=True),
        ["in.parquet: after row 200: cannot be read", "restore it"],
    ),
    "parquet of 0 bytes": (file("in.parquet", b""), ["in.parquet: not a readable parquet file", "restore it"]),
    "parquet of 0 rows": (table(pa.array([], pa.string())), ["in.parquet", "holds no row", "check"]),
    "numbers": (table([1, 2]), ["column 'text' holds int64, expected text", "--text-column"]),
    "bytes": (table(pa.array([b"a"], pa.binary())), ["column 'text' holds binary, expected text", "--text-column"]),
    "lists": (table([["a"], ["b"]]), ["column 'text' holds list<", "expected text", "--text-column"]),
    "another column": (table(TEXTS, name="body"), ["no column 'text'; it has body", "--text-column"]),
    "arrow stream cut": (
        arrow(False, lambda whole: whole[:-2000]),
        ["in.arrow: after row 300: cannot be read", "restore it"],
    ),
    "arrow stream without an end": (
        arrow(False, lambda whole: whole[:-8]),
        ["after row 400", "without its end mark", "--skip-bad-shards"],
    ),
    "arrow file cut": (arrow(True, lambda whole: whole[:-2000]), ["in.arrow: not a readable Arrow file", "restore it"]),
    "arrow stream with a moved offset": (
        arrow(False, moved_offset),
        ["in.arrow: after row 0: cannot be read", "restore it"],
    ),
    "arrow file with a moved offset": (
        arrow(True, moved_offset),
        ["in.arrow: after row 0: cannot be read", "restore it"],
    ),
    "no arrow": (
        file("in.arrow", b"once upon a time"),
        ["in.arrow: not a readable Arrow file or stream", "restore it"],
    ),
    "gz that is none": (
        file("in.jsonl.gz", LINES),
        ["in.jsonl.gz: after line 0: cannot be read (Not a gzipped file", "restore it"],
    ),
    "gz of 0 bytes": (file("in.jsonl.gz", b""), ["in.jsonl.gz: 0 bytes", "restore it"]),
    "gz cut": (
        file("in.jsonl.gz", gzip.compress(LINES)[:-100]),
        ["in.jsonl.gz: after line ", "cannot be read", "restore it"],
    ),
    "zst that is none": (file("in.jsonl.zst", LINES), ["in.jsonl.zst: after line 0: cannot be read", "restore it"]),
    "zst cut": (
        file("in.jsonl.zst", zstandard.compress(LINES)[:-100]),
        ["in.jsonl.zst: after line ", "middle of a compressed stream", "restore it"],
    ),
    "txt.zst cut": (
        file("in.txt.zst", zstandard.compress(LINES)[:-100]),
        ["in.txt.zst: cannot be read", "middle of a compressed stream"],
    ),
    "jsonl of 0 bytes": (file("in.jsonl", b""), ["in.jsonl", "holds no row", "check"]),
    "txt of 0 bytes": (file("in.txt", b""), ["in.txt", "empty 1", "check"]),
    "rows without the field": (
        file("in.jsonl", b'{"body": "x", "id": 1}\n' * 3),
        ["missing 3", "a row has body, id", "--text-column"],
    ),
    "an array over lines": (
        file("in.jsonl", b'[\n{"text": "a"},\n{"text": "b"}\n]\n'),
        ["invalid-json", "one JSON object", "jq -c '.[]'"],
    ),
    "an array in one line": (
        file("in.jsonl", b'[{"text": "a"}, {"text": "b"}]'),
        ["invalid-json 1", "one JSON object", "jq -c '.[]'"],
    ),
    "json": (file("in.json", b'[{"text": "a"}]'), ["in.json: unknown kind of file", ".parquet", "jq -c '.[]'"]),
    "latin-1": (file("in.txt", "größe".encode("latin-1")), ["in.txt", "invalid-utf8 1", "iconv"]),
    "utf-16": (file("in.jsonl", '{"text": "a"}\n'.encode("utf-16") * 3), ["in.jsonl", "invalid-utf8", "iconv"]),
    "most rows are no text": (
        file("in.jsonl", b'{"text": "a good one"}\n' + b'{"text": 7}\n' * 3),
        ["3 of 4 rows are no documents (not-text 3)", "--max-drop-fraction 0.1", "raise the limit"],
    ),
    "unknown kind": (file("in.pdf", b"%PDF"), ["in.pdf: unknown kind of file", ".parquet"]),
    "folder as file": (folder_with("in.parquet"), ["in.parquet", "matches no file, only folders", ".parquet", "check"]),
    "folder of other files": (folder_with("in", "a.pdf"), ["matches no file, only folders", "check"]),
    "no such file": (lambda folder: folder / "in.jsonl", ["in.jsonl'", "matches no file", "check the folder"]),
    "glob without a match": (lambda folder: folder / "*.jsonl", ["*.jsonl'", "matches no file", "check the folder"]),
    "empty pattern": (lambda folder: "", ["an empty pattern", "expected a file"]),
    "unknown protocol": (
        lambda folder: "carrier-pigeon://in.jsonl",
        ["carrier-pigeon://in.jsonl'", "cannot be listed", "check the address"],
    ),
    "server that is down": (
        lambda folder: "http://127.0.0.1:9/in.jsonl",
        ["http://127.0.0.1:9/in.jsonl'", "cannot be listed", "check"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_named_with_the_next_step_and_nothing_is_written_as_finished(
    case: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, parts = FILES[case]
    message = refusal(arguments(build(tmp_path), tokenizer_folder, tmp_path / "out"), capsys)
    assert [part for part in parts if part not in message] == [], message
    assert not (tmp_path / "out" / token_files.MANIFEST).exists()


@pytest.mark.parametrize(
    "case",
    [
        *(
            "parquet cut in two",
            "parquet with damaged pages",
            "arrow stream cut",
            "arrow file cut",
            "arrow file with a moved offset",
        ),
        *("arrow stream without an end", "gz cut", "zst cut", "gz of 0 bytes"),
    ],
)
def test_a_bad_file_among_good_ones_is_passed_over_when_asked_and_listed(
    case: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    bad = FILES[case][0](tmp_path / "a")
    (tmp_path / "a" / "good.jsonl").write_bytes(LINES)
    assert main(arguments(tmp_path / "a", tokenizer_folder, tmp_path / "out", "--skip-bad-shards")) == 0
    assert "1 files could not be read whole" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [entry["path"] for entry in facts["bad_files"]] == [str(bad)]
    assert facts["rows"] == facts["documents"] + sum(facts["drops"].values())
    good = next(source for source in facts["sources"] if source["path"].endswith("good.jsonl"))
    assert (good["rows"], good["documents"]) == (400, 400)


TOKENIZERS: dict[str, tuple[dict[str, str], list[str]]] = {
    "empty folder": ({}, ["found nothing; expected tokenizer.json"]),
    "only a vocabulary": (
        {"vocab.json": "{}"},
        ["found vocab.json; expected tokenizer.json, or vocab.json with merges.txt"],
    ),
    "broken vocabulary and merges": (
        {"vocab.json": "{}", "merges.txt": "a b"},
        ["vocab.json and merges.txt cannot be read", "restore them"],
    ),
    "a list for a config": (
        {"tokenizer.json": "GOOD", "tokenizer_config.json": "[1]"},
        ["tokenizer_config.json: found a list", "restore"],
    ),
    "half a file": (
        {"tokenizer.json": '{"version": "1'},
        ["tokenizer.json: not a tokenizer the tokenizers library can read"],
    ),
    "no tokenizer": ({"tokenizer.json": "{}"}, ["tokenizer.json: not a tokenizer the tokenizers library can read"]),
    "half a config": (
        {"tokenizer.json": "GOOD", "tokenizer_config.json": "{"},
        ["tokenizer_config.json: not a JSON file", "restore it"],
    ),
    "an EOS that is not there": (
        {"tokenizer.json": "GOOD", "tokenizer_config.json": '{"eos_token": "<none>"}'},
        ["names the eos_token '<none>', which is not in tokenizer.json", "mend"],
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_folder_that_holds_none_is_named(
    case: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents, parts = TOKENIZERS[case]
    (tmp_path / "in.jsonl").write_bytes(LINES)
    (tmp_path / "tokenizer").mkdir()
    for name, text in contents.items():
        good = (tokenizer_folder / "tokenizer.json").read_text()
        (tmp_path / "tokenizer" / name).write_text(good if text == "GOOD" else text)
    message = refusal(arguments(tmp_path / "in.jsonl", tmp_path / "tokenizer", tmp_path / "out"), capsys)
    assert [part for part in [str(tmp_path / "tokenizer"), *parts] if part not in message] == [], message
    assert not (tmp_path / "out").exists()


EVALUATION: dict[str, tuple[Build, str]] = {
    "missing": (lambda folder: folder / "eval.jsonl", "matches no file"),
    "parquet cut": (table(TEXTS, cut=0.5), "in.parquet: cannot be read"),
    "no arrow": (file("eval.arrow", b"once upon a time"), "eval.arrow: cannot be read"),
    "no gz": (file("eval.jsonl.gz", LINES), "eval.jsonl.gz: cannot be read"),
    "zst cut": (file("eval.jsonl.zst", zstandard.compress(LINES)[:-100]), "eval.jsonl.zst: cannot be read"),
    "no UTF-8": (file("eval.txt", b"\xff"), "eval.txt: cannot be read"),
    "short texts": (file("eval.txt", b"two words"), "no text of 8 words or more"),
}


@pytest.mark.parametrize("case", EVALUATION)
def test_evaluation_text_that_cannot_be_read_is_refused_before_the_work(
    case: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, part = EVALUATION[case]
    (tmp_path / "corpus.jsonl").write_bytes(LINES)
    options = arguments(
        tmp_path / "corpus.jsonl", tokenizer_folder, tmp_path / "out", "--decontaminate", str(build(tmp_path))
    )
    assert part in refusal(options, capsys)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_was_cut_between_two_starts_is_made_again(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        (tmp_path / f"in_{number}.jsonl").write_bytes(LINES)
    whole, half = arguments(tmp_path / "in_*", tokenizer_folder, tmp_path / "whole"), tmp_path / "half"
    assert main(whole) == 0
    assert main(arguments(tmp_path / "in_*", tokenizer_folder, half, "--part", "1/2")) == 0
    shard = half / "tokens-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-4])
    capsys.readouterr()
    assert main(arguments(tmp_path / "in_*", tokenizer_folder, half)) == 0
    assert "unit 2: its shard is missing or was cut; it is made again" in capsys.readouterr().err
    assert content(half) == content(tmp_path / "whole")


@pytest.mark.parametrize("name", ["plan.json", "units/00000.json"])
def test_half_a_record_of_earlier_work_is_named(
    name: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        (tmp_path / f"in_{number}.jsonl").write_bytes(LINES)
    assert main(arguments(tmp_path / "in_*", tokenizer_folder, tmp_path / "out", "--part", "1/2")) == 0
    record = tmp_path / "out" / name
    record.write_bytes(record.read_bytes()[:20])
    assert f"{record}: not a JSON file" in refusal(
        arguments(tmp_path / "in_*", tokenizer_folder, tmp_path / "out"), capsys
    )


def test_an_output_folder_that_is_something_else_is_refused(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(LINES)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("precious")
    message = refusal(arguments(tmp_path / "in.jsonl", tokenizer_folder, tmp_path / "thesis"), capsys)
    assert "thesis: exists and holds no plan of `argonne prepare`; choose another --out or remove it" in message
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "precious"
    message = refusal(arguments(tmp_path / "in.jsonl", tokenizer_folder, tmp_path / "in.jsonl"), capsys)
    assert "in.jsonl: is a file; give a folder" in message
    message = refusal(arguments(tmp_path / "in.jsonl", tokenizer_folder, tmp_path / "in.jsonl" / "out"), capsys)
    assert "in.jsonl" in message
    assert "check the path" in message


def test_an_output_inside_the_input_folder_is_never_read_as_text(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer").mkdir()
    for path in tokenizer_folder.iterdir():
        shutil.copyfile(path, tmp_path / "tokenizer" / path.name)
    (tmp_path / "tokenizer" / "merges.txt").write_text("a file of a known kind")
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(2):
        (folder / f"in_{number}.jsonl").write_bytes(LINES)
    assert main(arguments(folder, tmp_path / "tokenizer", folder / "tokens", "--part", "1/2")) == 0
    assert (folder / "tokens" / "tokenizer" / "merges.txt").is_file()
    assert main(arguments(folder, tmp_path / "tokenizer", folder / "tokens")) == 0
    assert "800 rows = 800 documents + 0 dropped" in capsys.readouterr().err


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder for everyone, and this process without the rights of root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    was = os.geteuid()
    yield folder
    os.seteuid(was)
    shutil.rmtree(folder)


def test_a_file_or_folder_without_the_right_to_it_is_named(
    as_nobody: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tokenizer_folder, as_nobody / "tokenizer")
    for name in ("open.jsonl", "secret.jsonl", "secret.parquet"):
        (as_nobody / name).write_bytes(LINES)
    (as_nobody / "secret.jsonl").chmod(0)
    (as_nobody / "secret.parquet").chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    message = refusal(arguments(as_nobody / "secret.jsonl", as_nobody / "tokenizer", as_nobody / "out"), capsys)
    assert "secret.jsonl: cannot be opened (Permission denied)" in message
    message = refusal(arguments(as_nobody / "secret.parquet", as_nobody / "tokenizer", as_nobody / "out"), capsys)
    assert "secret.parquet: not a readable parquet file" in message
    assert "Permission denied" in message
    message = refusal(arguments(as_nobody / "open.jsonl", as_nobody / "tokenizer", Path("/proc/out")), capsys)
    assert "/proc/out" in message


def test_a_full_disk_keeps_what_is_finished_and_the_same_command_goes_on(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        (tmp_path / f"in_{number}.jsonl").write_bytes(LINES)
    command = arguments(tmp_path / "in_*", tokenizer_folder, tmp_path / "out")
    extend = ShardWriter.extend

    def full(self: ShardWriter, ids: np.ndarray) -> None:
        if self.path.name == "tokens-00001.bin":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        extend(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "extend", full)
        assert "no space left on the disk; the units that are finished are kept" in refusal(command, capsys)
    assert sorted(path.name for path in (tmp_path / "out").glob("*tokens-*.bin*")) == ["tokens-00000.bin"]
    assert main(command) == 0
    assert main(arguments(tmp_path / "in_*", tokenizer_folder, tmp_path / "whole")) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_hold_out_that_came_out_empty_is_said(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": "ab"}) + "\n" for _ in range(100)))
    assert main(arguments(tmp_path / "in.jsonl", tokenizer_folder, tmp_path / "out", "--hold-out", "0.05")) == 0
    said = capsys.readouterr().err
    assert "100 rows = 100 documents + 0 held out (expected 5) + 0 dropped" in said
    assert "warning: --hold-out 0.05 held out none of 100 documents" in said
    assert "give --hold-out 0.02 or more" in said


def test_a_first_file_without_text_does_not_stop_the_others(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in_1.txt").write_bytes(b"")
    (tmp_path / "in_2.jsonl").write_bytes(LINES)
    command = arguments(tmp_path / "in_*", tokenizer_folder, tmp_path / "out")
    command[command.index("--encoder") + 1] = "auto"
    assert main(command) == 0
    assert "401 rows = 400 documents + 1 dropped (empty 1)" in capsys.readouterr().err


def test_the_same_folder_can_be_written_again_by_the_same_process(tokenizer_folder: Path, tmp_path: Path) -> None:
    found = []
    for count in (10, 20):
        (tmp_path / f"in_{count}.jsonl").write_bytes(b"".join(LINES.splitlines(keepends=True)[:count]))
        assert main(arguments(tmp_path / f"in_{count}.jsonl", tokenizer_folder, tmp_path / "out")) == 0
        found.append(open_tokens(tmp_path / "out").documents)
        shutil.rmtree(tmp_path / "out")
    assert found == [10, 20]
