"""A process that has torch and the package loaded and forks victims: a victim starts in a fraction of a second.

Run as `python -m tests.crash.mother`. It reads one job a line from stdin (JSON: recipe, run, log, ranks, stop_after,
crash, plant, record), answers `{"pids": [..]}` when the victims run and `{"codes": [..]}` when all have ended
(negative: the signal). It never trains itself, so that nothing but modules is inherited.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# What a training session imports on its way; loaded once, here.
MODULES = (
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.nn.parallel",
    "argonne.cli.train",
    "argonne.stages.sft",
    "argonne.train.trainer",
    "argonne.train.checkpoint",
    "argonne.model.build",
    "argonne.model.save",
    "argonne.model.load",
    "argonne.data.loader",
    "argonne.tokens.tokenizer",
    "argonne.serve.engine",
    "argonne.plan",
    "tests.crash.faults",
    "tests.crash.plants",
)


def serve(modules: Iterable[str], work: Callable[[dict[str, Any]], int]) -> None:
    """Load `modules`, then fork the ranks of one job after another, each of which ends with the exit code of
    `work(job)`.
    """
    for name in modules:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        ranks = int(job.get("ranks", 1))
        port = _free_port() if ranks > 1 else 0
        pids = []
        for rank in range(ranks):
            if (pid := os.fork()) == 0:
                _victim(job, rank, ranks, port, work)
            pids.append(pid)
        print(json.dumps({"pids": pids}), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"codes": codes}), flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _victim(job: dict[str, Any], rank: int, ranks: int, port: int, work: Callable[[dict[str, Any]], int]) -> None:
    """Do the work, then end at once with its code or 1 (raised); never returns."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        if ranks > 1:  # joins as a worker of torchrun does
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
            }
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        code = work(job)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _command(job: dict[str, Any]) -> int:
    """The real command, in a session and process group of its own; its exit code."""
    from argonne.cli import main
    from argonne.errors import REQUESTS
    from tests.crash import plants

    os.setsid()
    for number in REQUESTS:  # what the tests' own start ignores (a shell's `&` does SIGINT) a victim hears
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if job.get("plant"):
        getattr(plants, job["plant"])()
    if job.get("stderr") == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    elif job.get("stderr") == "without a reader":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
    elif job.get("stderr") == "closed":
        os.close(2)
        sys.stderr = None  # as Python starts then
    sys.argv = ["argonne", *job["command"]]
    return main()


def _train(job: dict[str, Any]) -> int:
    """0 (complete) or 3 (stopped)."""
    if job.get("command"):
        return _command(job)
    from argonne.recipe import load_recipe
    from argonne.stages.pretrain import run
    from tests.crash import faults, plants

    if job.get("crash"):
        faults.arm(Path(job["run"]), **job["crash"])
    if job.get("plant"):
        getattr(plants, job["plant"])()
    if job.get("record"):
        plants.record_batches(Path(job["record"]))
    recipe = load_recipe(job["recipe"], {})
    result = run(recipe, Path(job["run"]), stop_after_step=job.get("stop_after"))
    return 0 if result.outcome.complete else 3


if __name__ == "__main__":
    serve(MODULES, _train)
