"""`argonne rehearse` in a process that has everything loaded: it forks one for each rehearsal, in which a fault can be
planted first.

Run as `python -m tests.rehearse.commands`. It reads one job a line from stdin (JSON: argv, log, cwd, plant).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.crash.mother import MODULES, serve

ROOT = Path(__file__).resolve().parents[2]


class Rehearsals:
    """Runs commands one after the other."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.rehearse.commands"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer("ready")

    def _answer(self, name: str) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process of tests.rehearse.commands ended"
        return json.loads(line)[name]

    def run(self, words: str, folder: Path, plant: str | None = None) -> tuple[int, str]:
        """Exit code of `argonne WORDS` in `folder`, and all that it said. Temporary files lie in `folder`/tmp."""
        assert self._process.stdin is not None
        log = folder.parent / f"{folder.name}.log"
        job = {"argv": words.split(), "log": str(log), "cwd": str(folder), "plant": plant}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self._answer("pids")
        (code,) = self._answer("codes")
        return code, log.read_text()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def _run(job: dict[str, Any]) -> int:
    import tempfile

    from argonne import cli
    from tests.rehearse import plants

    os.chdir(job["cwd"])
    tempfile.tempdir = str(Path(job["cwd"]) / "tmp")
    os.makedirs(tempfile.tempdir)
    if job["plant"]:
        getattr(plants, job["plant"])()
    return cli.main(job["argv"])


if __name__ == "__main__":
    serve((*MODULES, "argonne.cli", "argonne.prepare.from_text", "argonne.rehearse.chain"), _run)
