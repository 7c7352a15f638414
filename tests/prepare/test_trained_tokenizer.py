"""What a tokenizer is trained on: the whole of a long document, a bounded part of everything, and no promise of more
entries than the text gives.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from argonne.cli import main
from argonne.prepare import documents, planning
from argonne.prepare.options import PrepareOptions, TokenizerOptions
from argonne.tokens.tokenizer import load_tokenizer


def sampled(path: Path) -> list[str]:
    found = documents.find_files((str(path),))
    options = PrepareOptions((str(path),), path.with_name("out"))
    units = [documents.Unit(0, 0, *piece) for piece in documents.cut(found[0], 1 << 30, options.text_column)]
    return list(planning.sample_texts(found, units, options.recipe()))


def test_a_long_document_is_read_to_its_end(tmp_path: Path) -> None:
    text = "the fox\n" * 400_000 + "zebra"
    (tmp_path / "long.txt").write_text(text)
    pieces = sampled(tmp_path / "long.txt")
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 1 << 20


def test_a_long_document_gives_no_more_than_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long.txt").write_text("the fox\n" * 400_000)
    monkeypatch.setattr(planning, "TOKENIZER_CHARACTERS", 2_000_000)
    assert sum(map(len, sampled(tmp_path / "long.txt"))) == 2_000_000


def test_little_text_gives_fewer_entries_and_a_warning_with_both_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("the quick fox and the quick fox\n" * 3)
    planning.train_tokenizer_on_files(TokenizerOptions((str(tmp_path / "a.txt"),), 4096, tmp_path / "alone"))
    size = load_tokenizer(tmp_path / "alone").vocab_size
    assert size < 4096
    warning = f"warning: the text gave a tokenizer of {size:,} entries, asked for were 4,096"
    assert warning in capsys.readouterr().err
    command = ["prepare", "--input", str(tmp_path / "a.txt"), "--train-tokenizer", "4096", "--out", str(tmp_path / "o")]
    assert main(command) == 0
    assert warning in capsys.readouterr().err


def test_enough_text_warns_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the quick fox and the quick fox\n" * 3)
    planning.train_tokenizer_on_files(TokenizerOptions((str(tmp_path / "a.txt"),), 290, tmp_path / "alone"))
    assert "warning" not in capsys.readouterr().err
