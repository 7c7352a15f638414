"""Victims: training processes that die on purpose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from argonne.config import Recipe
from argonne.plan.shape import as_trained
from argonne.recipe import to_toml

ROOT = Path(__file__).resolve().parents[2]


class Mother:
    """Speaks with the process of mother.py; one group of victims at a time."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "tests.crash.mother"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == {"ready": True}
        self.pids: list[int] = []

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the mother process ended"
        return dict(json.loads(line))

    def start(self, recipe: Recipe, run: Path, *, ranks: int = 1, **options: Any) -> list[int]:
        """Fork the victims of one session; returns their process ids. `options`: `crash`, `plant`, `record`
        and `stop_after`."""
        file = run.parent / "recipe.toml"
        file.write_text(to_toml(as_trained(recipe)))
        job = {
            "recipe": str(file),
            "run": str(run),
            "ranks": ranks,
            "log": str(run.parent / f"{run.name}.log"),
            **options,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self.pids = list(self._answer()["pids"])
        return self.pids

    def command(self, arguments: list[str], log: Path, **options: Any) -> int:
        """Fork one victim that runs `argonne ARGUMENTS` in a session of its own; returns its process id. `options`:
        `stderr` ("full", "without a reader", "closed"), `plant`.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": arguments, "log": str(log), **options}) + "\n")
        self._process.stdin.flush()
        self.pids = list(self._answer()["pids"])
        return self.pids[0]

    def wait(self) -> list[int]:
        """Exit codes of the victims once all have ended; a signal is negative."""
        self.pids = []
        return list(self._answer()["codes"])

    def send(self, number: signal.Signals) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def kill(self) -> list[int]:
        """`kill -9` to all victims that still run."""
        for pid in self.pids:
            with suppress(ProcessLookupError):  # all had ended, and the mother has waited for them
                os.kill(pid, signal.SIGKILL)
        return self.wait()

    def close(self) -> None:
        if self.pids:
            self.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="session")
def _mother() -> Iterator[Mother]:
    mother = Mother()
    yield mother
    mother.close()


@pytest.fixture
def mother(_mother: Mother) -> Iterator[Mother]:
    yield _mother
    if _mother.pids:  # the test failed while a victim ran
        _mother.kill()


@pytest.fixture
def finish(mother: Mother) -> Callable[..., None]:
    """Runs a session to its end and fails with the victim's own words."""

    def run_to_the_end(recipe: Recipe, run: Path, *, ranks: int = 1, **options: Any) -> None:
        mother.start(recipe, run, ranks=ranks, **options)
        codes = mother.wait()
        log = run.parent / f"{run.name}.log"
        assert codes == [0] * ranks, log.read_text()[-4000:]

    return run_to_the_end
