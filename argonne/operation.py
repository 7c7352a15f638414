"""Keys of how a run goes on, is watched and is spread over devices: they may change between its sessions, and none
changes what is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from argonne.declare import key


@dataclass(frozen=True)
class CheckpointSection:
    every_steps: int = key(
        0, "save after this many steps; 0 = not by steps", bounds="at least 0", changes="files", free=True
    )
    every_minutes: float = key(
        30.0, "save after this many minutes; 0 = not by time", bounds="at least 0", changes="files", free=True
    )
    keep_last: int = key(2, "newest checkpoints kept", bounds="at least 1", changes="files", free=True)
    keep_every: int = key(
        0,
        "checkpoints at multiples of this are kept for good; 0 = none",
        bounds="at least 0",
        changes="files",
        free=True,
    )
    keep_best: bool = key(
        False,
        "keep the checkpoint of the lowest held-out loss too",
        changes="files",
        needs="held-out data and eval.every_steps != 0",
        free=True,
    )
    asynchronous: bool = key(False, "write while training goes on", changes="speed", free=True)
    sample_prompt: str = key(
        "Long long time ago",
        "prompt of the text sampled at each checkpoint, of a chat stage its first question; empty = none",
        changes="text",
        free=True,
    )
    sample_tokens: int = key(
        100,
        "tokens sampled at each checkpoint; of a chat stage, of each answer",
        bounds="at least 1",
        changes="text",
        needs="checkpoint.sample_prompt",
        free=True,
    )


@dataclass(frozen=True)
class EvalSection:
    every_steps: int = key(
        0,
        "held-out loss after this many steps; 0 = at the end only",
        bounds="at least 0",
        changes="files",
        needs="held-out data and eval.windows != 0",
        free=True,
    )
    windows: int = key(
        64,
        "held-out windows read each time; 0 = none",
        bounds="at least 0",
        changes="files",
        needs="held-out data",
        free=True,
    )
    tasks: tuple[str, ...] = key(
        (),
        'tasks measured at each checkpoint: "sums", "gsm8k:DATA", "bpb:DATA"',
        changes="files",
        free=True,
    )
    task_limit: int = key(
        100,
        "questions of each task at most; of bpb, contexts full of text",
        bounds="at least 1",
        changes="files",
        needs="eval.tasks",
        free=True,
    )


@dataclass(frozen=True)
class LogSection:
    every_steps: int = key(10, "steps between log lines", bounds="at least 1", changes="files", free=True)
    tensorboard: bool = key(True, "write TensorBoard files where tensorboard is installed", changes="files", free=True)
    wandb: str | None = key(None, "Weights & Biases project; unset = off", changes="files", free=True)
    trackio: str | None = key(None, "trackio project, kept on this machine; unset = off", changes="files", free=True)
    telemetry_limit: str = key("5m", "a sample or evaluation that takes longer is given up", changes="files", free=True)


# Zero is `auto`: what the plan recommends on the devices found (`argonne.plan.degrees`).
_degree = partial(key, 1, bounds="at least 0", changes="speed", free=True, zero="auto")


@dataclass(frozen=True)
class ParallelSection:
    nproc: int = key(
        0, "local worker processes; 0 = one a GPU, one on the CPU", bounds="at least 0", changes="speed", free=True
    )
    replicate: int = key(
        0, "data-parallel degree; auto = what is left", bounds="at least 0", changes="speed", free=True, zero="auto"
    )
    shard: int = _degree("degree of fully sharded data parallelism, or auto")
    tensor: int = _degree("degree of tensor parallelism, or auto")
    context: int = _degree("degree of context parallelism, or auto")
    pipeline: int = _degree("degree of pipeline parallelism, or auto")
    schedule: str = key(
        "1f1b",
        "order of micro-batches in a pipeline; interleaved gives each worker several stages",
        choices=("gpipe", "1f1b", "interleaved"),
        changes="speed",
        needs="parallel.pipeline != 1",
        free=True,
    )
    stages: int = key(
        2,
        "stages of a worker in an interleaved pipeline",
        bounds="at least 1",
        changes="speed",
        needs="parallel.schedule = interleaved",
        free=True,
    )
    max_restarts: int = key(
        3, "restarts of failed workers", bounds="at least 0", changes="end", needs="parallel.nproc != 1", free=True
    )
    timeout: str = key(
        "20m",
        "a worker without a step for this long is hung: all stop",
        changes="end",
        needs="parallel.nproc != 1",
        free=True,
    )
    async_tensor: bool = key(
        False, "overlap tensor-parallel collectives and compute (CUDA)", changes="speed", free=True
    )

    @property
    def open(self) -> tuple[str, ...]:
        """The degrees that are left to the plan. Every reader but the plan meets none."""
        return tuple(name for name in ("shard", "tensor", "context", "pipeline") if not getattr(self, name))


@dataclass(frozen=True)
class StopSection:
    wall_time: str | None = key(
        None, "stop and save after this long: seconds, or 90m, 12h, 1-12:00:00", changes="end", free=True
    )
    deadline: str | None = key(
        None, "stop and save before this moment: ISO 8601, or Unix seconds", changes="end", free=True
    )
    grace: str = key(
        "15m", "time of a stopping run for its save", changes="end", needs="parallel.nproc != 1", free=True
    )
