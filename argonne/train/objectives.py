"""Objectives: pure functions of (head, final hidden states, micro-batch)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from argonne.parallel.objective import Head, Loss, MicroBatch

BY_POSITION = "loss_by_position"


def next_token(head: Head, hidden: Tensor, micro: MicroBatch) -> Loss:
    """Cross-entropy of the next token, summed over the labels that are not -100, and z-loss where it has a weight."""
    total, penalty = head.loss_and_penalty(hidden, micro["shift_labels"])
    return _told_apart(head, total, penalty, micro)


def next_token_by_row(head: Head, hidden: Tensor, micro: MicroBatch) -> Loss:
    """The same, with each row's share of the cross-entropy: for runs that report the loss of each source."""
    log_p, log_z = head.token_log_probs(hidden, micro["shift_labels"])
    penalty = head.z_loss * log_z.square().sum()
    return _told_apart(head, penalty - log_p.sum(), penalty.detach(), micro, -log_p.detach().sum(dim=1))


def next_token_by_position(head: Head, hidden: Tensor, micro: MicroBatch) -> Loss:
    """The same for evaluation, with the loss of each band of positions as `loss_by_position/FIRST-LAST`, from 1 on.

    A band is as long as all before it: (0, T/8], (T/8, T/4], (T/4, T/2], (T/2, T] of rows of T tokens; with rows of
    four times the old context, its middle and its end are ends of bands. Positions are those that the model is given.
    """
    labels = micro["shift_labels"]
    log_p, log_z = head.token_log_probs(hidden, labels)
    valid, length = labels >= 0, labels.shape[1]
    places = micro.get("position_ids", torch.arange(length)).to(labels.device)
    edges = [0, *(length // parts for parts in (8, 4, 2, 1))]
    metrics = {}
    for first, last in pairwise(edges):
        inside = valid & (places >= first) & (places < last)
        if last > first:
            metrics[f"{BY_POSITION}/{first + 1}-{last}"] = -log_p[inside].sum(), inside.sum()
    penalty = head.z_loss * log_z.square().sum()
    told = _told_apart(head, penalty - log_p.sum(), penalty, micro, -log_p.sum(dim=1))
    return replace(told, metrics={**told.metrics, **metrics})


def _told_apart(head: Head, total: Tensor, penalty: Tensor, micro: MicroBatch, rows: Tensor | None = None) -> Loss:
    """z-loss is trained, and a metric of its own."""
    if not head.z_loss:
        return Loss(total, rows)
    return Loss(total, rows, {"z_loss": (penalty, (micro["shift_labels"] >= 0).sum())}, penalty)
