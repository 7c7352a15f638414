"""Which files and functions a training run opens: a small real run through the command line, in a process of its own,
under a profile hook.

Run as a script it is that process: `python tools/traced_run.py PACKAGE RESULT VERB ...` runs the verb and writes what
it saw as JSON.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

# A step record of metrics.jsonl ends one step and begins the next.
RECORD = "MetricsLog.write"
# A batch is what this runs, and what other threads do for it; what the log asks of the data in the same step is none of
# it.
BATCH = "Loader.batch"
# What places rows by arithmetic, many at once: not every batch needs it.
LOCATES = "locate"
READING = ("data", "tokens")
# The reading thread works ahead of the loop: over so many steps in a row at least one batch is read from beginning to
# end.
SPAN = 6
WARM = 4
STEPS = 44
RECIPE = {
    "model.vocab_size": "512",
    "model.hidden_size": "32",
    "model.num_hidden_layers": "2",
    "model.head_dim": "16",
    "model.num_attention_heads": "2",
    "model.num_key_value_heads": "1",
    "model.intermediate_size": "64",
    "data.sequence_length": "8",
    "batch.tokens_per_step": "1024",  # 128 rows: a block of thousands of rows ends within the run
    "batch.micro": "64",
    "train.steps": str(STEPS),
    "train.threads": "1",
    "train.device": "cpu",
    "parallel.nproc": "1",
    "schedule.warmup": "3",
    "log.every_steps": "1",
    "log.tensorboard": "false",
    "checkpoint.every_steps": "0",
    "checkpoint.every_minutes": "0",
    "checkpoint.sample_prompt": "",
    "eval.every_steps": "0",
    "eval.windows": "0",
}


@dataclass(frozen=True, order=True)
class Ran:
    """A function that ran: its file below the folder that holds the package, its qualified name, its first line."""

    file: str
    function: str
    line: int

    @property
    def room(self) -> str:
        """`argonne/train/step.py` -> train; `argonne/files.py` -> files."""
        return Path(self.file).parts[1].removesuffix(".py")


@dataclass(frozen=True)
class Trace:
    """What ran from the command to the first forward pass, and between each two successive step records; `batches`: for
    the batch alone.
    """

    start: frozenset[Ran]
    steps: tuple[frozenset[Ran], ...]
    batches: tuple[frozenset[Ran], ...]

    def step(self) -> tuple[frozenset[Ran], frozenset[Ran], bool]:
        """(what a steady step runs, what its batch runs, whether that located a new block of rows).

        Of SPAN steps in a row, without such a block where there are any.
        """
        firsts = range(WARM, len(self.steps) - SPAN + 1)
        if not firsts:
            raise ValueError(
                f"{len(self.steps)} steps were traced, expected at least {WARM + SPAN}: give the run more steps"
            )
        plain = [first for first in firsts if not any(map(_locates, _joined(self.steps[first : first + SPAN])))]
        first = plain[0] if plain else firsts[len(firsts) // 2]
        return _joined(self.steps[first : first + SPAN]), _joined(self.batches[first : first + SPAN]), not plain

    def locating(self) -> frozenset[Ran]:
        """What the batches ran that located a new block of rows; empty where none did after the start."""
        return _joined([batch for batch in self.batches[WARM:] if any(map(_locates, batch))])

    def knows_locating(self) -> bool:
        """Did anything locate rows at all? Otherwise its name has changed, and `step` cannot tell."""
        return any(_locates(ran) for part in (self.start, *self.steps) for ran in part)


def _joined(parts: Iterable[frozenset[Ran]]) -> frozenset[Ran]:
    return frozenset().union(*parts)


def _locates(ran: Ran) -> bool:
    return ran.room == "data" and ran.function.rpartition(".")[2] == LOCATES


class Recorder:
    """The profile hook. Every thread adds to the part that is open: a frame that is entered, the one it came from, and
    one that is left.

    What only runs because a module of the package is imported (a registration, the keys of a dataclass) is left out: no
    reader passes there.
    """

    def __init__(self, package: Path) -> None:
        self._package = str(package)
        self._main = threading.get_ident()
        self._importing: dict[int, int] = {}
        self._batch = 0
        self._open_batch: set[CodeType] = set()
        self._batches: list[set[CodeType]] = []
        self._model = str(package / "model")
        self._open: set[CodeType] = set()
        self._start: set[CodeType] | None = None
        self._steps: list[set[CodeType]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code, thread = frame.f_code, threading.get_ident()
        if code.co_name == "<module>" and code.co_filename.startswith(self._package):
            self._importing[thread] = self._importing.get(thread, 0) + {"call": 1, "return": -1}.get(event, 0)
        if self._importing.get(thread):
            return
        if thread == self._main and code.co_qualname == BATCH:
            self._batch += {"call": 1, "return": -1}.get(event, 0)
        if event in ("call", "return") and (self._batch or thread != self._main):
            self._open_batch.add(code)
        if event == "call":
            if code.co_qualname == RECORD and frame.f_locals.get("event") == "step":
                self._steps.append(self._open)
                self._batches.append(self._open_batch)
                self._open, self._open_batch = set(), set()
            elif self._start is None and code.co_name == "forward" and code.co_filename.startswith(self._model):
                self._start, self._open = self._open, set()
            self._open.add(code)
            if frame.f_back is not None:
                self._open.add(frame.f_back.f_code)
        elif event == "return":
            self._open.add(frame.f_code)

    def result(self) -> dict[str, Any]:
        """JSON of a Trace. The part before the first step record is no step: nothing says where it began."""
        if self._start is None or not self._steps:
            raise RuntimeError(
                "the run made no forward pass in the package's model, or wrote no step record through MetricsLog.write"
            )
        steps, batches = ([self._functions(part) for part in parts[1:]] for parts in (self._steps, self._batches))
        return {"start": self._functions(self._start), "steps": steps, "batches": batches}

    def _functions(self, codes: set[CodeType]) -> list[tuple[str, str, int]]:
        """Functions of the package that have a name: no module or class bodies, comprehensions, generator expressions
        or lambdas.
        """
        above = Path(self._package).parent
        return sorted(
            (Path(code.co_filename).relative_to(above).as_posix(), code.co_qualname, code.co_firstlineno)
            for code in codes
            if code.co_filename.startswith(self._package + os.sep)
            and code.co_flags & inspect.CO_OPTIMIZED
            and not code.co_name.startswith("<")
        )


def trace_run(package: Path) -> Trace:
    """Run the package that lies in the folder `package` on the help topics that any Python carries. Raises RuntimeError
    where a verb fails.
    """
    from pydoc_data.topics import topics

    with tempfile.TemporaryDirectory(prefix="argonne-size-") as name:
        folder = Path(name)
        (folder / "topics.jsonl").write_text(
            "".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics))
        )
        prepared = ("--train-tokenizer", "512", "--hold-out", "0.1", "--workers", "1", "--out", "tokens")
        _run(package, folder, "-m", package.name, "prepare", "--input", "topics.jsonl", *prepared)
        source = f'[{{ path = "{folder}/tokens", max_epochs = 99 }}]'
        keys = [word for key, value in {**RECIPE, "data.sources": source}.items() for word in (f"--{key}", value)]
        _run(package, folder, __file__, str(package), "result.json", "pretrain", "nano-3.0", "--run", "run", *keys)
        found = json.loads((folder / "result.json").read_text())
    return Trace(_ran(found["start"]), tuple(map(_ran, found["steps"])), tuple(map(_ran, found["batches"])))


def _ran(functions: Sequence[tuple[str, str, int]]) -> frozenset[Ran]:
    return frozenset(Ran(*function) for function in functions)


def _run(package: Path, folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise RuntimeError(f"the traced run failed with exit code {done.returncode}: {' '.join(arguments)}\n{said}")


def main(arguments: Sequence[str]) -> int:
    """The traced process: PACKAGE RESULT VERB ... The libraries come first: under the hook their import takes three
    times as long.
    """
    package, result, *verb = arguments
    import torch._dynamo  # noqa: F401
    from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401

    recorder = Recorder(Path(package))
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    try:
        from argonne import cli

        if Path(str(cli.__file__)).parent not in (Path(package), Path(package) / "cli"):
            raise RuntimeError(f"{cli.__file__}: another argonne than {package} was imported")
        code = cli.main(verb)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    if code == 0:
        Path(result).write_text(json.dumps(recorder.result()))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
