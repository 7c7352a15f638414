"""Preparing text in tests: what came out, and what a refused command says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argonne.cli import main
from argonne.prepare.progress import ProgressBar
from argonne.tokens.formats import open_tokens
from tests.tokensets import words

QUIET = ProgressBar("prepare", 0, None)
TEXTS = [words(12, number) for number in range(400)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def content(folder: Path) -> dict[str, str]:
    """Hash of each file of a folder, without the locks."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", ".turn")
    }


def documents_of(folder: Path, held_out: bool = False) -> list[list[int]]:
    opened = open_tokens(folder)
    stream = opened.held_out if held_out else opened.train
    ids = np.zeros(stream.tokens, dtype=np.int64)
    stream.copy(0, ids)
    return [part.tolist() for part in np.split(ids, stream.document_ends)[:-1]]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def long_text(size: int) -> str:
    generator = np.random.default_rng(1)
    lines = [words(int(count), seed).strip() for seed, count in enumerate(generator.integers(3, 40, 200))]
    text = ""
    while len(text) < size:
        text += lines[int(generator.integers(len(lines)))] + ("\n\n" if generator.random() < 0.2 else "\n")
    return text


def arguments(pattern: Path | str, tokenizer: Path, out: Path, *more: str) -> list[str]:
    return [
        *("prepare", "--input", str(pattern), "--tokenizer", str(tokenizer), "--out", str(out)),
        *("--workers", "1", "--encoder", "tokenizers", *more),
    ]


def refusal(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that is refused: the last line, and the only one that begins with the program's name."""
    capsys.readouterr()
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == "" or command[0] == "inspect"
    lines = captured.err.splitlines()
    assert [line for line in lines if line.startswith("argonne: ")] == lines[-1:]
    assert "Traceback" not in captured.err
    return lines[-1]
