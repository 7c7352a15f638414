"""`argonne` commands that a test can kill: a process that has torch and the package loaded forks one for each command
line.

Run as `python -m tests.prepare.commands`. It reads one job a line from stdin (JSON: argv, log, ranks), answers
`{"pids": [..]}` when the commands run and `{"codes": [..]}` when all have ended (negative: the signal).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.crash.mother import MODULES, serve

ROOT = Path(__file__).resolve().parents[2]


class Commands:
    """Starts commands in the process of this module; one group at a time."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "tests.prepare.commands"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer("ready")
        self.pids: list[int] = []

    def _answer(self, name: str) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process of tests.prepare.commands ended"
        return json.loads(line)[name]

    def start(self, argv: Sequence[str], log: Path, *, ranks: int = 1) -> list[int]:
        """Begin `argonne ARGV` as so many ranks; returns their process ids."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"argv": list(argv), "log": str(log), "ranks": ranks}) + "\n")
        self._process.stdin.flush()
        self.pids = list(self._answer("pids"))
        return self.pids

    def wait(self) -> list[int]:
        """Exit codes once all ranks have ended; a signal is negative."""
        self.pids = []
        return list(self._answer("codes"))

    def kill(self) -> list[int]:
        """`kill -9` to all ranks that still run."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self.wait()

    def run(self, argv: Sequence[str], log: Path, *, ranks: int = 1) -> None:
        """From start to end; fails with the command's own words."""
        self.start(argv, log, ranks=ranks)
        assert self.wait() == [0] * ranks, log.read_text()[-4000:]

    def close(self) -> None:
        if self.pids:
            self.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def tokenisers(run: Path) -> list[int]:
    """The tokenising processes that work for `run`, whoever started them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:  # ended since
                continue
            if b"argonne.prepare.from_text" in words and any(os.fsencode(run / "data") in word for word in words):
                found.append(int(entry.name))
    return sorted(found)


def wait_for_end(pids: Sequence[int], seconds: float = 60.0) -> None:
    """Return once none of these processes of others runs any more; fails after `seconds`."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([descriptor], [], [], seconds)[0], f"process {pid} still runs"
        finally:
            os.close(descriptor)


def _run(job: dict[str, Any]) -> int:
    from argonne import cli

    return cli.main(job["argv"])


if __name__ == "__main__":
    serve((*MODULES, "argonne.cli", "argonne.prepare.from_text"), _run)
