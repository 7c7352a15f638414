"""A request to stop is heard at every moment of a session, and nothing is lost by it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from argonne.config import Recipe
from argonne.errors import REQUESTS, Stopped
from argonne.stages.pretrain import PRETRAIN, token_windows
from argonne.stages.session import run_session
from argonne.stages.setup import Session
from argonne.stages.stage import Stage
from argonne.train import checkpoint
from argonne.train.run import STOPPED, RunFolder

Nano = Callable[..., Recipe]


def stage_with(open_data: Callable[..., Any]) -> Stage:
    return Stage(PRETRAIN.objective, open_data)


def ask_and_wait(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    threading.Event().wait(60)
    pytest.fail("a request did not end the wait")


@pytest.mark.parametrize("number", REQUESTS)
def test_a_request_during_set_up_ends_it_at_once_and_the_run_is_as_it_was(
    nano: Nano, tmp_path: Path, number: signal.Signals
) -> None:
    def waiting(*arguments: Any) -> Any:
        ask_and_wait(number)

    with pytest.raises(Stopped, match=f"{number.name}.* before the first step"):
        run_session(Session(nano(), tmp_path / "run", stage_with(waiting)))
    assert not (tmp_path / "run").exists()


def test_a_request_while_the_loop_waits_for_data_saves_what_was_trained(nano: Nano, tmp_path: Path) -> None:
    def stuck(*arguments: Any) -> Any:
        data: Any = token_windows(*arguments)
        plain = data.read

        def read(step: int, *rest: Any) -> Any:
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                left.wait(3)
            return plain(step, *rest)

        data.read = read
        return data

    left = threading.Event()
    try:
        outcome = run_session(Session(nano(), tmp_path / "run", stage_with(stuck)))
    finally:
        left.set()
    assert outcome.reason == "SIGTERM"
    assert 3 <= outcome.step <= 5
    assert [saved.step for saved in checkpoint.list_checkpoints(tmp_path / "run")][-1] == outcome.step


def test_a_last_save_that_fails_leaves_the_marker_at_the_checkpoint_before(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = checkpoint.save_checkpoint

    def failing(run: Path, step: int, *rest: Any, **named: Any) -> None:
        if step > 4:
            raise OSError(28, "No space left on device")
        plain(run, step, *rest, **named)

    monkeypatch.setattr(checkpoint, "save_checkpoint", failing)
    with pytest.raises(Stopped, match=r"the last save failed: .*No space left"):
        run_session(Session(nano(), tmp_path / "run", PRETRAIN, stop_after_step=6))
    marker = RunFolder(tmp_path / "run").marker(STOPPED)
    assert marker is not None
    assert marker["step"] == 4
