"""Seconds until a command has answered: `argonne --help` and other verbs that need no model, beside the libraries' own
import times.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import Benchmark, Column, main

COMMANDS = {
    "argonne --help": ["argonne", "--help"],
    "argonne pretrain --help": ["argonne", "pretrain", "--help"],
    "argonne pretrain nano-3.0 --dry-run": ["argonne", "pretrain", "nano-3.0", "--dry-run"],
    "python -c pass": ["python", "-c", "pass"],
    "python -c 'import numpy'": ["python", "-c", "import numpy"],
    "python -c 'import torch'": ["python", "-c", "import torch"],
    "python -c 'import transformers'": ["python", "-c", "import transformers"],
}


def seconds(command: list[str]) -> dict[str, float]:
    """The command once to warm the file cache, then once measured."""
    program = str(Path(sys.executable).with_name(command[0]))
    for _ in range(2):
        start = time.perf_counter()
        subprocess.run([program, *command[1:]], check=True, capture_output=True)
        taken = time.perf_counter() - start
    return {"seconds": taken}


BENCHMARK = Benchmark(
    name="start_up",
    module="benchmarks.start_up",
    contestants={name: (lambda point, command=command: seconds(command)) for name, command in COMMANDS.items()},  # type: ignore[misc]
    points={"warm": "Seconds to the end of the command, warm"},
    columns=(Column("seconds", "seconds", ".2f"),),
    relative_to="python -c 'import torch'",
    higher_is_better=False,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
