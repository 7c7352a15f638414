"""What a card gets beside its text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from argonne.publish.source import Trained
from argonne.publish.stage import draw_loss
from tests.report.written import step_record, write_run


def test_a_card_without_matplotlib_has_no_picture_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    past = [Trained(write_run(tmp_path / "run", [step_record(1)]), {"recipe": {"stage": "pretrain"}})]
    assert draw_loss(past, tmp_path / "there" / "loss.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_loss(past, tmp_path / "not" / "loss.png")
    assert not (tmp_path / "not").exists()
    assert "pip install 'argonne[plots]'" in capsys.readouterr().err
