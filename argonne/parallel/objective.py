"""What a training step computes, as parallelism sees it: an objective of hidden states and head, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

# Tensors of one micro-batch by name, rows first. `input_ids` and perhaps `position_ids` are the model's; the objective
# reads the others.
MicroBatch = Mapping[str, Tensor]


class Head(Protocol):
    """What turns final hidden states (B, T, H) into logits and losses; labels (B, T), -100 = not trained."""

    @property
    def z_loss(self) -> float: ...
    @property
    def weight(self) -> Tensor: ...
    def of_part(self, weight: Tensor, first: int, group: ProcessGroup) -> Head: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
    def summed_loss(self, hidden: Tensor, labels: Tensor) -> Tensor: ...
    def loss_and_penalty(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...
    def token_log_probs(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Loss:
    """What an objective returns for one micro-batch.

    total: the loss summed over what is trained (the batch names the count it is divided by). rows: each row's share,
    (B,), detached, where sources are told apart. metrics: name -> (sum, count), both 0-dim and detached, added over
    micro-batches and ranks before they are divided. penalty: the part of the total that is trained and no part of the
    loss that is told (z-loss), detached.
    """

    total: Tensor
    rows: Tensor | None = None
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    penalty: Tensor | float = 0.0

    def on_host(self) -> Loss:
        """The same without a graph, where any process can read it."""
        rows = None if self.rows is None else self.rows.detach().cpu()
        metrics = {name: (value.cpu(), count.cpu()) for name, (value, count) in self.metrics.items()}
        return Loss(self.total.detach().cpu(), rows, metrics, float(self.penalty))


# It gets the final hidden states and the head, never the whole model, so that the last stage of a pipeline can run it.
Objective = Callable[[Head, Tensor, MicroBatch], Loss]
