"""Parts of one set that run at the same moment: one plans, one finishes, none disturbs another."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from argonne import layout
from argonne.prepare import planning
from argonne.prepare import prepare as preparing
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare, sole_writer
from tests.prepare.helpers import QUIET, content
from tests.tokensets import words


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    for number in range(6):
        rows = [{"text": words(60, 100 * number + row)} for row in range(10)]
        (tmp_path / f"part_{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "part_*.jsonl")


def is_held(path: Path) -> bool:
    """Does somebody hold the lock?"""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def test_parts_that_run_at_once_write_the_bytes_of_one_run(corpus: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    expected = content(prepare(PrepareOptions((corpus,), tmp_path / "expected", tokenizer_folder, workers=1), QUIET))
    command = [sys.executable, "-m", "argonne", "prepare", "--input", corpus, "--tokenizer", str(tokenizer_folder)]
    command += ["--out", str(tmp_path / "out"), "--encoder", "tokenizers", "--part"]
    parts = [
        subprocess.Popen([*command, f"{number}/4"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for number in range(1, 5)
    ]
    assert [part.wait() for part in parts] == [0, 0, 0, 0]
    assert content(tmp_path / "out") == expected


@pytest.mark.parametrize(("module", "name"), [(planning, "_described"), (preparing, "finish")])
def test_one_process_at_a_time_plans_and_finishes(
    corpus: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    out, held = tmp_path / "out", list[bool]()
    original: Callable[..., Any] = getattr(module, name)

    def watched(*arguments: Any) -> Any:
        held.append(is_held(out / layout.TOKENS_TURN))
        return original(*arguments)

    monkeypatch.setattr(module, name, watched)
    prepare(PrepareOptions((corpus,), out, tokenizer_folder, part=(1, 1)), QUIET)
    assert held == [True]


def test_a_part_leaves_the_end_to_one_that_still_works(
    corpus: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = tmp_path / "out", list[str]()
    monkeypatch.setattr(preparing.ProgressBar, "log", lambda self, line: said.append(line))
    prepare(PrepareOptions((corpus,), out, tokenizer_folder, part=(1, 2)), QUIET)
    with sole_writer(out, shared=True):
        prepare(PrepareOptions((corpus,), out, tokenizer_folder, part=(2, 2)), QUIET)
        assert not (out / layout.MANIFEST).exists()
    assert said[-1] == "part 2/2 is done; a part that still works here will finish the set"
    prepare(PrepareOptions((corpus,), out, tokenizer_folder, part=(1, 2)), QUIET)
    assert (out / layout.MANIFEST).exists()


def test_a_finished_set_that_cannot_be_written_to_is_still_found_complete(
    corpus: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    options = PrepareOptions((corpus,), tmp_path / "out", tokenizer_folder, workers=1)
    before = content(prepare(options, QUIET))
    for name in (layout.TOKENS_LOCK, layout.TOKENS_TURN):
        (tmp_path / "out" / name).unlink()
    assert content(prepare(options, QUIET)) == before
    assert not (tmp_path / "out" / layout.TOKENS_TURN).exists()


def test_input_that_cannot_be_planned_leaves_no_folder_behind(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"other": "text"}\n')
    with pytest.raises(preparing.InputError):
        prepare(PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", tokenizer_folder), QUIET)
    assert not (tmp_path / "out").exists()
