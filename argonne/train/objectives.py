"""Objectives: pure functions of (head, final hidden states, micro-batch)."""

from __future__ import annotations

from torch import Tensor

from argonne.parallel.objective import Head, Loss, MicroBatch


def next_token(head: Head, hidden: Tensor, micro: MicroBatch) -> Loss:
    """Cross-entropy of the next token, summed over the labels that are not -100, and z-loss where it has a weight."""
    total, penalty = head.loss_and_penalty(hidden, micro["shift_labels"])
    return _told_apart(head, total, penalty, micro)


def next_token_by_row(head: Head, hidden: Tensor, micro: MicroBatch) -> Loss:
    """The same, with each row's share of the cross-entropy: for runs that report the loss of each source."""
    log_p, log_z = head.token_log_probs(hidden, micro["shift_labels"])
    penalty = head.z_loss * log_z.square().sum()
    return _told_apart(head, penalty - log_p.sum(), penalty.detach(), micro, -log_p.detach().sum(dim=1))


def _told_apart(head: Head, total: Tensor, penalty: Tensor, micro: MicroBatch, rows: Tensor | None = None) -> Loss:
    """z-loss is trained, and a metric of its own."""
    if not head.z_loss:
        return Loss(total, rows)
    return Loss(total, rows, {"z_loss": (penalty, (micro["shift_labels"] >= 0).sum())}, penalty)
