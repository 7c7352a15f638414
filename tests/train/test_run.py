"""The run directory: one owner, markers, manifest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from argonne.errors import InputError
from argonne.train.run import COMPLETE, LOCK, STOPPED, RunFolder


def test_a_second_owner_is_refused_with_host_pid_and_the_way_out(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    first.acquire()
    with pytest.raises(InputError) as caught:
        RunFolder(tmp_path).acquire()
    assert str(os.getpid()) in str(caught.value)
    assert "give --take-over" in str(caught.value)
    first.release()
    RunFolder(tmp_path).acquire()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, pathlib; from argonne.train.run import RunFolder; "
        f"RunFolder(pathlib.Path({str(tmp_path)!r})).acquire(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (tmp_path / LOCK).exists()
    RunFolder(tmp_path).acquire()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_the_lock_of_another_host_is_never_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "time": 0}))
    os.utime(tmp_path / LOCK, (0, 0))
    with pytest.raises(InputError, match="has not been heard of"):
        RunFolder(tmp_path).acquire()


def test_a_marker_carries_run_step_and_config_and_replaces_the_other(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_manifest({})
    run.write_marker(STOPPED, step=3, reason="SIGTERM", config_hash="abc")
    run.write_marker(COMPLETE, step=9, reason="complete", config_hash="abc")
    marker = run.marker(COMPLETE)
    assert marker is not None
    assert (marker["run_id"], marker["step"], marker["config_hash"]) == (run.run_id, 9, "abc")
    assert run.marker(STOPPED) is None


def test_a_resumed_run_keeps_its_identity_and_counts_sessions(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_manifest({})
    first = run.run_id
    run.write_manifest({})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (run.run_id, manifest["sessions"]) == (first, 2)
    assert manifest["versions"]["torch"]


def test_a_lock_that_a_living_process_holds_is_never_stale_whatever_its_process_id_means_here(tmp_path: Path) -> None:
    owner = RunFolder(tmp_path)
    owner.acquire()
    lock = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**lock, "pid": 2**22 + 1}))  # as another PID namespace sees it
    for take_over in (False, True):
        with pytest.raises(InputError, match="in use"):
            RunFolder(tmp_path).acquire(take_over=take_over)
    owner.release()
    RunFolder(tmp_path).acquire()


def test_the_lock_of_another_host_is_taken_over_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "time": 0}))
    with pytest.raises(InputError, match="give --take-over"):
        RunFolder(tmp_path).acquire()
    RunFolder(tmp_path).acquire(take_over=True)
