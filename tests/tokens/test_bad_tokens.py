"""Damaged token sets through the real command line: training and inspect refuse them with exit code 2 and name the
file.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argonne.cli import main
from argonne.errors import InputError
from argonne.tokens import shards as token_files
from argonne.tokens.formats import open_tokens
from tests.prepare.helpers import LINES, arguments, refusal


@pytest.fixture
def prepared(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A finished token set of 400 documents, 40 of them held out."""
    (tmp_path / "in.jsonl").write_bytes(LINES)
    assert main(arguments(tmp_path / "in.jsonl", tokenizer_folder, tmp_path / "set", "--hold-out", "0.1")) == 0
    return tmp_path / "set"


def edited(name: str, edit: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(edit(bytearray((folder / name).read_bytes()))) and None


def replaced(place: int, value: bytes) -> Callable[[bytearray], bytearray]:
    def edit(whole: bytearray) -> bytearray:
        whole[place : place + len(value)] = value
        return whole

    return edit


SHARD, INDEX = "tokens-00000.bin", "tokens-00000.idx"
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "shard cut": (edited(SHARD, lambda whole: whole[:-10]), [SHARD, "the header counts", "write it again"]),
    "shard of 100 bytes": (edited(SHARD, lambda whole: whole[:100]), [SHARD, "less than a header"]),
    "shard gone": (lambda folder: (folder / SHARD).unlink(), [SHARD, "cannot be read", "restore it"]),
    "flipped bit": (
        edited(SHARD, lambda whole: replaced(1500, bytes([whole[1500] ^ 1]))(whole)),
        [SHARD, "other bytes", "restore it"],
    ),
    "header count": (
        edited(SHARD, replaced(8, struct.pack("<I", 7))),
        [SHARD, "the header counts 7 tokens", "write it again"],
    ),
    "magic": (
        edited(SHARD, replaced(0, struct.pack("<I", 7))),
        [SHARD, "magic number 7, expected 20240801 or 20240520"],
    ),
    "index cut": (edited(INDEX, lambda whole: whole[:-3]), [INDEX, "expected 2,928 for 366 documents", "restore it"]),
    "held-out shard gone": (
        lambda folder: (folder / "held_out-00000.bin").unlink(),
        ["held_out-00000.bin", "cannot be read", "restore it"],
    ),
    "half a manifest": (
        edited("manifest.json", lambda whole: whole[:200]),
        ["manifest.json: not a JSON file", "restore it"],
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), ["manifest.json"]),
    "a shard of another folder": (
        edited("manifest.json", lambda whole: whole.replace(b'"tokens-00000.bin"', b'"../other/tokens-00000.bin"')),
        ["manifest.json: damaged", "expected a file of this folder"],
    ),
    "a negative count": (
        edited("manifest.json", lambda whole: whole.replace(b'"documents": 366', b'"documents": -366')),
        ["expected", INDEX, "-2,928 for -366 documents"],
    ),
    "a count in quotes": (
        edited("manifest.json", lambda whole: whole.replace(b'"documents": 366', b'"documents": "366"')),
        ["manifest.json: damaged", "and whole numbers"],
    ),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), ["tokenizer: no such folder"]),
}
SMALL = [
    *(
        "--model.vocab_size",
        "512",
        "--model.hidden_size",
        "32",
        "--model.num_hidden_layers",
        "1",
        "--model.intermediate_size",
        "64",
    ),
    *(
        "--model.num_attention_heads",
        "2",
        "--model.num_key_value_heads",
        "1",
        "--model.head_dim",
        "16",
        "--train.steps",
        "5",
    ),
    *(
        "--data.sequence_length",
        "32",
        "--batch.tokens_per_step",
        "128",
        "--schedule.warmup",
        "0",
        "--train.threads",
        "1",
    ),
    *("--log.tensorboard", "false", "--checkpoint.sample_tokens", "2", "--eval.windows", "2"),
]


def pretrain(path: Path | str, run: Path, *more: str) -> list[str]:
    source = f"[{{ path = {json.dumps(str(path))}, max_epochs = 9 }}]"
    return [
        "pretrain",
        "nano-3.0",
        "--run",
        str(run),
        *SMALL,
        "--data.sources",
        source,
        "--data.verify",
        "before",
        *more,
    ]


@pytest.mark.parametrize("case", DAMAGE)
def test_training_and_inspect_refuse_a_damaged_set_and_name_the_file(
    case: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, parts = DAMAGE[case]
    damage(prepared)
    message = refusal(pretrain(prepared, tmp_path / "run"), capsys)
    assert [part for part in [str(prepared), *parts] if part not in message] == [], message
    message = refusal(["inspect", str(prepared)], capsys)
    assert str(prepared) in message
    assert parts[0].partition(":")[0] in message


def test_an_id_past_the_vocabulary_stops_training_with_the_name_of_the_file(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.arange(2000, dtype="<u4") % 300
    ids[100] = 70_000
    (tmp_path / "train.bin").write_bytes(token_files.header("uint32", 2000) + ids.tobytes())
    message = refusal(
        pretrain(tmp_path / "train.bin", tmp_path / "run", "--data.tokenizer", str(tokenizer_folder)), capsys
    )
    assert "train.bin: holds id 70,000, the tokenizer" in message
    assert "has 386 entries; set data.tokenizer to the one that made these tokens" in message
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    assert "token 100 has id 70,000, the vocabulary has 386" in refusal(
        ["inspect", str(tmp_path / "train.bin")], capsys
    )


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("in.jsonl", ["in.jsonl: is text, not tokens", "argonne prepare"]),
        ("nowhere", ["nowhere: no such file or folder", "argonne prepare"]),
        ("nowhere*.bin", ["nowhere*.bin: matches no file", "check the pattern"]),
        ("tokens.bin", ["tokens.bin: 4 bytes are less than a header"]),
        ("half", ["half", "interrupted", "run it again"]),
    ],
)
def test_what_is_no_finished_token_set_is_refused_by_name(
    name: str,
    parts: list[str],
    prepared: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tokens.bin").write_bytes(b"abcd")
    (tmp_path / "faulty.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    assert main(arguments(tmp_path / "faulty.jsonl", tokenizer_folder, tmp_path / "half")) == 2
    message = refusal(pretrain(tmp_path / name, tmp_path / "run"), capsys)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("wrong", ["back", "past"])
def test_document_ends_outside_their_shard_are_refused_where_they_are_read(
    wrong: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = np.fromfile(prepared / INDEX, "<u8")
    place, value = (200, ends[100]) if wrong == "back" else (-1, ends[-1] + 1)
    ends[place] = value
    ends.tofile(prepared / INDEX)
    said = f"{INDEX}: its document ends do not ascend to"
    with pytest.raises(InputError, match=said):
        open_tokens(prepared).train.ends_between(10, 90)
    # Without the folder's own hashes as one of others:
    assert said in refusal(["inspect", str(prepared / SHARD)], capsys)
    command = pretrain(prepared, tmp_path / "run", "--data.document_mask", "true", "--data.verify", "off")
    assert said in refusal(command, capsys)


@pytest.mark.parametrize("name", [SHARD, INDEX])
def test_a_shard_that_is_cut_while_it_is_read_is_one_line(name: str, prepared: Path) -> None:
    stream = open_tokens(prepared).train
    stream.copy(0, np.zeros(8, np.int64))
    assert len(stream.ends_between(0, 50)) > 0
    os.truncate(prepared / name, 1100)
    ids = np.zeros(9000, np.int64)
    with pytest.raises(InputError, match=rf"{name}: cannot be read \(it ends at byte 1,100, and was longer"):
        stream.copy(0, ids) if name == SHARD else stream.document_ends


@pytest.mark.parametrize(("found", "place"), [(-1, 100), (-(2**31), 7), (70_000, 1970)])
def test_an_id_outside_the_vocabulary_is_named_with_its_place_in_signed_files_too(
    found: int, place: int, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.arange(2000, dtype="<i4") % 300
    ids[place] = found
    ids.tofile(tmp_path / "mega.bin")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 1, 2)
    (tmp_path / "mega.idx").write_bytes(head + struct.pack("<iqqq", 2000, 0, 0, 1))
    command = pretrain(tmp_path / "mega.bin", tmp_path / "run", "--data.tokenizer", str(tokenizer_folder))
    message = refusal([*command, "--train.steps", "16"], capsys)
    assert f"mega.bin: holds id {found:,}, the tokenizer" in message
    assert f"it is token {place:,} of the file" in message
    if found < 0:
        said = refusal(["inspect", str(tmp_path / "mega.bin")], capsys)
        assert f"token {place:,} has id {found:,}, which no vocabulary has" in said


def megatron_index(sizes: list[int], documents: list[int]) -> bytes:
    pointers = np.concatenate([[0], np.cumsum(sizes)])[:-1] * 4
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(sizes), len(documents))
    return (
        head
        + b"".join(np.array(part, kind).tobytes() for part, kind in ((sizes, "<i4"), (pointers, "<i8")))
        + (np.array(documents, "<i8").tobytes())
    )


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


LISTED = json.dumps({"files": [{"bin_path": "a.bin", "lengths_path": "a.npy"}]}).encode()
OUTSIDE = "mega.idx: its sequences or documents lie outside"
NO_NUMBERS = "a.npy: not a readable .npy of numbers"
FOREIGN: list[tuple[str, str, bytes, str]] = [
    ("mega.bin", "mega.idx", megatron_index([6, 4], [0, 1, 9]), OUTSIDE),
    ("mega.bin", "mega.idx", megatron_index([12, -2], [0, 1, 2]), OUTSIDE),
    ("mega.bin", "mega.idx", megatron_index([6, 4], [0, 2, 1]), "mega.idx: document 1 ends at token 6, before it"),
    ("trove.ds", "trove.ds.index", np.array([9, 3, 10], "<u8").tobytes(), "index: document 1 ends at token 3, before"),
    ("list.json", "list.json", b'{"files": [{"bin_path": "a.bin"}]}', "list.json: entry 0 of files: found {"),
    ("list.json", "list.json", b'{"files": [5]}', "list.json: entry 0 of files: found 5"),
    ("list.json", "list.json", b'{"files": []}', "list.json: names no file"),
    ("list.json", "a.npy", npy(np.array([12, -2])), "a.npy: document 1 ends at token 10, before it"),
    ("list.json", "a.npy", npy(np.array([{}])), NO_NUMBERS),
    ("list.json", "a.npy", npy(np.arange(9))[:-9], NO_NUMBERS),
    ("list.json", "a.npy", b"", NO_NUMBERS),
    ("list.json", "a.npy", npy(np.array([2.5])), "a.npy: holds float64 of shape"),
]


@pytest.mark.parametrize(("opened", "name", "content", "said"), FOREIGN)
def test_an_index_of_others_that_lies_outside_its_tokens_is_one_line(
    opened: str, name: str, content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tokens in ("mega.bin", "trove.ds", "a.bin"):
        np.arange(10, dtype="<i4").tofile(tmp_path / tokens)
    (tmp_path / "list.json").write_bytes(LISTED)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(said)):
        open_tokens(tmp_path / opened)
    assert said in refusal(["inspect", str(tmp_path / opened)], capsys)


def test_inspect_does_not_call_verified_what_has_no_hashes(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.arange(9, dtype="<u2").tofile(tmp_path / "raw.bin")
    assert main(["inspect", f"raw-uint16:{tmp_path / 'raw.bin'}"]) == 0
    told = capsys.readouterr().out
    assert "verified: no" in told
    assert "sizes agree, no hashes to verify" in told
    assert main(["inspect", str(prepared)]) == 0
    assert "everything verifies" in capsys.readouterr().out
