"""Damaged token sets through the real command line: training and inspect refuse them with exit code 2 and name the
file.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argonne.cli import main
from argonne.tokens import shards as token_files
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
