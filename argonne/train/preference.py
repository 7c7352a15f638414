"""Losses of preference pairs: pure functions of the policy's and the reference's scores of a chosen and a rejected
answer, and the objective that makes scores of packed pairs.

Notation: c = score of the chosen answer less the reference's, r = the same of the rejected one, h = c - r, s the
logistic function, b = beta, e = smoothing. A score is the log-probability of an answer, summed over its tokens or their
mean ("length-normalised").

| kind | loss of a pair | source |
| --- | --- | --- |
| sigmoid | -(1 - e) log s(b h) - e log s(-b h) | DPO, arXiv 2305.18290 eq. 7; e > 0: conservative DPO, Mitchell 2023 |
| robust | (-(1 - e) log s(b h) + e log s(-b h)) / (1 - 2 e) | arXiv 2403.00409 eq. 7 |
| ipo | (h - 1 / (2 b))^2 | arXiv 2310.12036 eq. 17 |
| hinge | max(0, 1 - b h) | RSO, arXiv 2309.06657 eq. 11; SLiC |
| apo-zero | 1 - s(b c) + s(b r) | arXiv 2408.06266 eq. 4 |
| apo-down | s(b c) + 1 - s(b h) | arXiv 2408.06266 eq. 5 |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from argonne.config import DpoSection
from argonne.parallel.objective import Head, Loss, MicroBatch, Objective

# (c, r, beta, smoothing) -> (pairs,) losses.
PairLoss = Callable[[Tensor, Tensor, float, float], Tensor]


def sigmoid(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    h = beta * (c - r)
    return -(1 - smoothing) * F.logsigmoid(h) - smoothing * F.logsigmoid(-h)


def robust(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    h = beta * (c - r)
    return (-(1 - smoothing) * F.logsigmoid(h) + smoothing * F.logsigmoid(-h)) / (1 - 2 * smoothing)


def ipo(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    return (c - r - 1 / (2 * beta)).square()


def hinge(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    return F.relu(1 - beta * (c - r))


def apo_zero(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    return 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r)


def apo_down(c: Tensor, r: Tensor, beta: float, smoothing: float) -> Tensor:
    return torch.sigmoid(beta * c) + 1 - torch.sigmoid(beta * (c - r))


LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "apo-zero": apo_zero,
    "apo-down": apo_down,
}


def loss_at_start(options: DpoSection) -> float:
    """The loss of a policy that is its reference, without the weight on the chosen answer."""
    zero = torch.zeros((), dtype=torch.float64)
    return float(LOSSES[options.loss](zero, zero, options.beta, options.smoothing))


def pair_scores(head: Head, hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """((rows, P, 2) summed log-probabilities of the answers of each pair, chosen first, and (rows, P, 2) their trained
    tokens). P: pairs a row holds at most; where there are fewer both are 0.

    `answer` of the micro-batch, (rows, T): 2 n for a token of the chosen answer of pair n of its row, 2 n + 1 of the
    rejected one; any number where the label is -100.
    """
    labels = micro["shift_labels"]
    log_p, _ = head.token_log_probs(hidden, labels)
    rows, pairs = micro["reference"].shape[:2]
    place = torch.where(labels >= 0, micro["answer"], 2 * pairs)
    sums = log_p.new_zeros(rows, 2 * pairs + 1).scatter_add(1, place, log_p)
    counts = torch.zeros_like(sums).scatter_add(1, place, (labels >= 0).to(sums.dtype))
    shape = (rows, pairs, 2)
    return sums[:, :-1].reshape(shape), counts[:, :-1].reshape(shape)


def preference(options: DpoSection) -> Objective:
    """The objective over packed pairs, summed over pairs; the batch's `reference` (rows, P, 2) holds the reference's
    summed log-probabilities, `pairs` (rows,) how many pairs each row holds.
    """
    loss_of = LOSSES[options.loss]

    def objective(head: Head, hidden: Tensor, micro: MicroBatch) -> Loss:
        sums, counts = pair_scores(head, hidden, micro)
        reference = micro["reference"].to(sums.dtype)
        size = counts.clamp_min(1)
        scores, known = (sums / size, reference / size) if options.scores == "mean" else (sums, reference)
        c, r = (scores - known).unbind(-1)
        there = torch.arange(sums.shape[1], device=sums.device) < micro["pairs"][:, None]
        compared = loss_of(c, r, options.beta, options.smoothing)
        likelihood = -sums[..., 0] / size[..., 0]
        losses = compared + options.chosen_weight * likelihood if options.chosen_weight else compared
        losses = torch.where(there, losses, 0)
        count = there.sum()

        def mean_of(values: Tensor) -> tuple[Tensor, Tensor]:
            return torch.where(there, values.detach(), 0).sum(), count

        metrics = {
            # Of the margin against the reference; one that is 0 is a coin thrown.
            "accuracy": mean_of((c > r).to(c.dtype) + 0.5 * (c == r)),
            "margin": mean_of(options.beta * (c - r)),
            "reward/chosen": mean_of(options.beta * c),
            "reward/rejected": mean_of(options.beta * r),
            "log_p/chosen": mean_of(sums[..., 0]),
            "log_p/rejected": mean_of(sums[..., 1]),
            "loss/pair": mean_of(compared),
            "loss/chosen": mean_of(likelihood),
        }
        return Loss(losses.sum(), losses.detach().sum(dim=1), metrics)

    return objective
