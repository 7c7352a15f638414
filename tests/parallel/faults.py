"""Faults planted in a worker's objective: fired once, on one rank, at one call; picklable, so that
workers carry them.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._dynamo.exc import TorchDynamoException

from argonne.errors import InputError
from argonne.parallel.objective import Head, Loss, MicroBatch
from argonne.train.objectives import next_token


@dataclass
class Fault:
    """`kind`: a signal's name (sent to this worker), "parent SIGTERM", "raise", "wrong input", "compiler",
    "weight" (the head's is moved), "exit", "nan" or "inf".

    `mark`: written before it fires, so that it fires once.
    """

    kind: str
    rank: int
    call: int
    mark: Path
    parent: int = 0
    calls: int = 0

    def __call__(self, head: Head, hidden: torch.Tensor, micro: MicroBatch) -> Loss:
        self.calls += 1
        loss = next_token(head, hidden, micro)
        if self.calls < self.call or int(os.environ.get("RANK", "0")) != self.rank or self.mark.exists():
            return loss
        self.mark.write_text(self.kind)
        if self.kind == "raise":
            raise RuntimeError("a planted fault")
        if self.kind == "wrong input":
            raise InputError("a planted one")
        if self.kind == "compiler":
            raise TorchDynamoException("a planted one")
        if self.kind == "weight":
            head.weight.data += 1
            return loss
        if self.kind == "exit":
            os._exit(7)
        if self.kind == "nan":
            return Loss(loss.total * torch.nan)
        # In one number of the final hidden state: the gradients of some parameters stay finite. Of the last token, the
        # last rank's own where a text is split.
        if self.kind == "inf":
            return Loss(loss.total + (hidden[0, -1, 0] * 3e38).half().float())
        if self.kind.startswith("parent "):
            os.kill(self.parent, getattr(signal, self.kind.removeprefix("parent ")))
        else:
            os.kill(os.getpid(), getattr(signal, self.kind))
        return loss
