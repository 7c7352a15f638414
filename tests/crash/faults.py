"""Crash injection: the n-th operation of a save on the disk is the last thing that a victim does.

Operations are every open for writing, write, fsync, rename, unlink, rmdir, mkdir and symlink below the run folder, from
the moment a save (or another folder that is to be complete or absent) begins until the next step is logged. They are
seen through Python's audit events and wrapped `open` and `os.fsync`.

Modes: `kill` dies before the operation (in the middle of it where it is a write), and the kernel keeps what was
written. `power cut` loses also what was not flushed: unflushed bytes of each file, and the rename of a folder whose
parent was not flushed.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAVE, END = ".tmp-checkpoint_step_", '"event": "step"'
EXIT_CODE = 9


class Injector:
    """Counts operations below `run`; `at` is the number of the fatal one, 0 for none: then `report` gets the list of
    all.
    """

    def __init__(self, run: Path, *, at: int, mode: str, report: str, begin: str) -> None:
        self.begin = begin
        self.run, self.at, self.power_cut, self.report = os.fspath(run), at, mode == "power cut", report
        self.count, self.saving, self.over = 0, False, False
        self.seen: list[str] = []
        self.flushed: dict[str, int] = {}  # file -> bytes that survive a power cut
        self.renamed: list[tuple[str, str]] = []  # folders renamed since their parent was flushed

    def inside(self, path: str) -> bool:
        return path == self.run or path.startswith(self.run + os.sep)

    def operation(self, kind: str, path: str, half: Callable[[], None] = lambda: None) -> None:
        """One operation is about to happen; `half` does a part of it."""
        self.saving = not self.over and (self.saving or (kind == "mkdir" and self.begin in path))
        if not self.saving or not self.inside(path):
            return
        self.count += 1
        self.seen.append(f"{kind} {os.path.relpath(path, self.run)}")
        if self.count == self.at:
            half()
            self.die()

    def end_of_save(self) -> None:
        if self.saving:
            self.saving, self.over = False, True
            Path(self.report).write_text("\n".join(self.seen) + "\n")

    def die(self) -> None:
        self.at = 0
        Path(self.report).write_text(self.seen[-1] + "\n")
        if self.power_cut:
            for source, target in reversed(self.renamed.copy()):
                os.rename(target, source)
            for path, size in list(self.flushed.items()):
                if os.path.isfile(path) and os.path.getsize(path) > size:
                    os.truncate(path, size)
        os._exit(EXIT_CODE)

    def move(self, source: str, target: str) -> None:
        """Follow files through a rename of themselves or of a folder above."""
        for path in [path for path in self.flushed if path == source or path.startswith(source + os.sep)]:
            self.flushed[target + path[len(source) :]] = self.flushed.pop(path)

    def fsync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self.operation("fsync", path)
        if os.path.isdir(path):
            self.renamed = [(source, target) for source, target in self.renamed if os.path.dirname(target) != path]
        elif path in self.flushed:
            self.flushed[path] = os.path.getsize(path)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                where = _absolute(path, -1)
                self.operation("open", where)
                if self.inside(where):
                    size = os.path.getsize(where) if os.path.exists(where) and not flags & os.O_TRUNC else 0
                    self.flushed[where] = min(size, self.flushed.get(where, size))
        elif event == "os.rename":
            source, target = _absolute(arguments[0], arguments[2]), _absolute(arguments[1], arguments[3])
            self.operation("rename", source)
            if os.path.isdir(source) and not os.path.islink(source) and self.inside(target):
                self.renamed.append((source, target))
            self.move(source, target)
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate"):
            path = arguments[1] if event == "os.symlink" else arguments[0]
            folder = -1 if event == "os.truncate" else arguments[-1]
            where = _absolute(path, folder)
            self.operation(event.removeprefix("os.").replace("remove", "unlink"), where)
            self.flushed.pop(where, None)


class _Wrapped:
    """A file opened for writing whose writes are operations."""

    def __init__(self, file: Any, path: str, injector: Injector) -> None:
        self._file, self._path, self._injector = file, path, injector

    def write(self, data: Any) -> Any:
        if END in (data if isinstance(data, str) else bytes(data[:100]).decode(errors="replace")):
            self._injector.end_of_save()

        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._injector.operation("write", self._path, half)
        return self._file.write(data)

    def __enter__(self) -> _Wrapped:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _absolute(path: Any, folder: int) -> str:
    text = os.fsdecode(path)
    if os.path.isabs(text):
        return os.path.normpath(text)
    return os.path.join(os.getcwd() if folder < 0 else os.readlink(f"/proc/self/fd/{folder}"), text)


def arm(run: Path, *, at: int, report: str, mode: str = "kill", begin: str = SAVE) -> None:
    """Make operation `at` of this process fatal, counted from the making of folder `begin` on: its first save, if
    nothing else is said.

    There is no way back: the process is a victim.
    """
    injector = Injector(run, at=at, mode=mode, report=report, begin=begin)
    plain_open, plain_fsync = builtins.open, os.fsync

    def open_and_watch(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        opened = plain_open(file, mode, *rest, **named)
        path = "" if isinstance(file, int) else _absolute(file, -1)
        return _Wrapped(opened, path, injector) if injector.inside(path) and set(mode) & set("wax+") else opened

    def fsync_and_watch(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        injector.fsync(descriptor)
        plain_fsync(descriptor)

    builtins.open = io.open = open_and_watch  # type: ignore[assignment]
    os.fsync = fsync_and_watch
    sys.addaudithook(injector.audit)
