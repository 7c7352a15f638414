"""The run directory: who owns it, what it says it is, how it ended."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from argonne import __version__
from argonne.errors import InputError
from argonne.files import TEMPORARY, read_json, write_json
from argonne.layout import COMPLETE, LOCK, MANIFEST, METRICS, SAMPLES, STOPPED

_SILENT_SECONDS = 600.0


class RunFolder:
    """`runs/NAME`: config.toml, manifest.json, metrics.jsonl, samples.md, checkpoints, markers and the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def manifest(self) -> dict[str, Any]:
        return read_json(self.path / MANIFEST)

    @property
    def run_id(self) -> str:
        return str(self.manifest()["run_id"])

    def exists(self) -> bool:
        return (self.path / MANIFEST).exists()

    def marker(self, name: str) -> dict[str, Any] | None:
        """The content of the STOPPED or COMPLETE marker, None where there is none."""
        path = self.path / name
        return read_json(path) if path.exists() else None

    def write_marker(self, name: str, *, step: int, reason: str, config_hash: str) -> None:
        told = {"run_id": self.run_id, "step": step, "reason": reason, "config_hash": config_hash, "time": time.time()}
        write_json(self.path / name, told)
        (self.path / (COMPLETE if name == STOPPED else STOPPED)).unlink(missing_ok=True)

    def clear_markers(self) -> None:
        for name in (STOPPED, COMPLETE):
            (self.path / name).unlink(missing_ok=True)

    def acquire(self, *, take_over: bool = False) -> None:
        """Own the run, or raise InputError naming the process that does. A lock whose process is gone is taken over.

        The lock appears whole (a link to a flushed file): a process that dies on the way leaves none, or one that names
        it. The system holds it for the life of this process, whatever process ids mean where others look. take_over:
        a lock of another machine, which cannot be asked, is of a dead process.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"--run {self.path}: a file is in the way; give a folder") from None
        path = self.path / LOCK
        mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
            "time": time.time(),
        }
        prepared = self.path / f"{TEMPORARY}{LOCK}-{os.getpid()}"
        try:
            write_json(prepared, mine)
            with _one_at_a_time(self.path):
                if path.exists() and (lock_is_stale(path) or (take_over and not _is_held(path))):
                    path.unlink(missing_ok=True)
                _link(prepared, path)
                self._lock = open(path, encoding="utf-8")  # noqa: SIM115 - for the life of the session
                with suppress(OSError):  # a file system without such locks: process ids decide
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileExistsError:
            raise InputError(_locked_message(path)) from None
        except OSError as error:
            raise InputError(
                f"{path}: the run cannot be taken ({error}); make the folder writable, or choose another run"
            ) from None
        finally:
            with suppress(OSError):
                prepared.unlink(missing_ok=True)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
            # The process ends: its lock is dead, and taken over, even where it cannot be removed.
            with suppress(OSError):
                (self.path / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # a session that was refused before it wrote anything leaves no empty folder behind
                self.path.rmdir()

    def write_manifest(self, facts: dict[str, Any]) -> None:
        """What ran: versions, hardware, commit, and the facts the stage hands over. Identity survives a resume;
        sessions are counted.
        """
        import torch
        import transformers

        old = self.manifest() if self.exists() else {}
        package = Path(__file__).resolve().parents[2]
        command = ["git", "-C", str(package), "rev-parse", "HEAD"]
        commit = ""
        with suppress(OSError):  # there need be no git
            commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        manifest = {
            "format_version": 1,
            "run_id": old.get("run_id") or f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}",
            "name": self.path.name,
            "sessions": int(old.get("sessions", 0)) + 1,
            "versions": {
                "argonne": __version__,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            },
            "hardware": {
                "host": socket.gethostname(),
                "cpu_cores": os.cpu_count(),
                "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            },
            "git_commit": commit or None,
            **facts,
        }
        write_json(self.path / MANIFEST, manifest)

    def update_manifest(self, **facts: Any) -> None:
        write_json(self.path / MANIFEST, self.manifest() | facts)

    def add_sample(self, step: int, text: str) -> None:
        with open(self.path / SAMPLES, "a", encoding="utf-8") as file:
            file.write(f"## Step {step}\n\n{text}\n\n")


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Among processes of this host: two that find the same dead lock must not both take it, the second removing the
    first's.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without such locks: only the link below decides
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _link(source: Path, target: Path) -> None:
    """Give `source` a second name; FileExistsError where it is taken. Without hard links the content is written under
    the exclusive name.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        with open(target, "x", encoding="utf-8") as file:
            file.write(source.read_text())


def _process_start(pid: int) -> str:
    """Start time of a process in clock ticks since boot, so that a reused pid is not mistaken for the owner; empty
    where unknown.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_held(path: Path) -> bool:
    """Does a living process hold the lock, wherever its process id means something?"""
    with open(path, encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def lock_is_stale(path: Path) -> bool:
    """Is the lock's owner gone for certain? Of this host's that is told by the lock itself, process id and start time;
    of another host's never.
    """
    try:
        if _is_held(path):
            return False
        owner = json.loads(path.read_text())
    except FileNotFoundError:
        return True
    except ValueError:
        return abs(time.time() - path.stat().st_mtime) > 10  # either way: a clock may have been set back
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _process_start(int(owner["pid"])) != owner.get("started")


def _locked_message(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        metrics = path.with_name(METRICS)  # each logged step is a sign of life
        silent = time.time() - max(file.stat().st_mtime for file in (path, metrics) if file.exists())
    except (OSError, ValueError):
        return f"{path}: another process is taking this run; try again"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["time"]))
    hint = f" It has not been heard of for {silent / 60:.0f} minutes." if silent > _SILENT_SECONDS else ""
    return (
        f"{path.parent}: the run is in use by process {owner['pid']} on {owner['host']}, started {since}.{hint} Wait "
        f"for it, or if it is surely dead give --take-over"
    )
