"""`argonne` commands as a user starts them, each in a process of its own: forked from this one, which has everything
loaded.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from argonne.errors import REQUESTS
from argonne.train.allocator import keep_freed_memory

# What would make a command one of several, or show it a card.
OTHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NNODES", "NODE_RANK", "SLURM_STEP_NUM_TASKS")
POLL_SECONDS, LIMIT_SECONDS = 0.02, 900.0


def load() -> None:
    """Everything that the commands import, so that they start at once; what they free they keep, since the logits of a
    whole vocabulary are asked for in every step.
    """
    importlib.import_module("torch.distributed")
    importlib.import_module("transformers")
    importlib.import_module("argonne.stages.session")
    importlib.import_module("argonne.stages.pretrain")
    importlib.import_module("argonne.serve.engine")
    keep_freed_memory()


def run_command(words: list[str], log: Path, watch: Callable[[], bool] = lambda: False) -> int:
    """The exit code of `argonne WORDS`, negative for a signal; what it says is appended to `log`. Once `watch()` is
    true it is asked to stop.
    """

    def work() -> int:
        sys.argv = ["argonne", *words]
        try:
            runpy.run_module("argonne", run_name="__main__")
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return 0

    return run_forked(work, log, watch)


def run_forked(work: Callable[[], int], log: Path, watch: Callable[[], bool] = lambda: False) -> int:
    """As `run_command`, of a function."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be_a_command(work, log)
    asked, began = False, time.monotonic()
    try:
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if not asked and watch():
                os.kill(pid, signal.SIGTERM)
                asked = True
            if time.monotonic() > began + LIMIT_SECONDS:
                raise TimeoutError
            time.sleep(POLL_SECONDS)
    except BaseException as error:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
        if isinstance(error, TimeoutError):
            return -signal.SIGALRM
        raise


def _be_a_command(work: Callable[[], int], log: Path) -> None:
    """Do the work and end; never returns."""
    code = 1
    try:
        os.setsid()
        for number in REQUESTS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for name in OTHERS:
            os.environ.pop(name, None)
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
