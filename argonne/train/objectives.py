"""Objectives: pure functions of (head, final hidden states, micro-batch)."""

from __future__ import annotations

from torch import Tensor

from argonne.parallel.objective import Head, Loss, MicroBatch


def next_token(head: Head, hidden: Tensor, micro: MicroBatch) -> Loss:
    """Cross-entropy of the next token, summed over the labels that are not -100."""
    return Loss(head.summed_loss(hidden, micro["shift_labels"]))


def next_token_by_row(head: Head, hidden: Tensor, micro: MicroBatch) -> Loss:
    """The same, with each row's share: for runs that report the loss of each source."""
    log_p, log_z = head.token_log_probs(hidden, micro["shift_labels"])
    return Loss(head.z_loss * log_z.square().sum() - log_p.sum(), rows=-log_p.detach().sum(dim=1))
