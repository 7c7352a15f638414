"""Losses of preference pairs against the formulas of their papers in plain Python, and their gradients; the scores of
packed pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.config import DpoSection
from argonne.model.loss import IGNORED, Head, LossOptions
from argonne.train.preference import LOSSES, loss_at_start, pair_scores, preference


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# (log p of chosen, of rejected, the reference's of each, beta, smoothing) as the papers write them.
PAPERS: dict[str, Callable[[float, float, float, float, float, float], float]] = {
    "sigmoid": lambda w, x, rw, rx, b, e: (
        -(1 - e) * math.log(s(b * (w - rw) - b * (x - rx))) - e * math.log(s(b * (x - rx) - b * (w - rw)))
    ),
    "robust": lambda w, x, rw, rx, b, e: (
        (-(1 - e) * math.log(s(b * (w - rw) - b * (x - rx))) + e * math.log(s(b * (x - rx) - b * (w - rw))))
        / (1 - 2 * e)
    ),
    "ipo": lambda w, x, rw, rx, b, e: ((w - x) - (rw - rx) - 1 / (2 * b)) ** 2,
    "hinge": lambda w, x, rw, rx, b, e: max(0.0, 1 - (b * (w - rw) - b * (x - rx))),
    "apo-zero": lambda w, x, rw, rx, b, e: (1 - s(b * (w - rw))) + s(b * (x - rx)),
    "apo-down": lambda w, x, rw, rx, b, e: s(b * (w - rw)) + (1 - s(b * (w - rw) - b * (x - rx))),
}
# d loss / d (b h) where policy and reference agree, e = 0: the limit of (d loss / d w) / b as b goes to 0.
LIMITS = {"sigmoid": -0.5, "robust": -0.5, "hinge": -1.0, "apo-zero": -0.25, "apo-down": 0.0}
LOG_P = st.floats(-60, -0.1)


def test_every_loss_has_its_paper_here() -> None:
    assert set(PAPERS) == set(LOSSES)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(PAPERS)), LOG_P, LOG_P, LOG_P, LOG_P, st.floats(0.01, 0.5), st.floats(0, 0.4))
def test_a_loss_and_its_gradient_are_the_papers(
    kind: str,
    w: float,
    x: float,
    rw: float,
    rx: float,
    beta: float,
    smoothing: float,
) -> None:
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (w, x))
    loss = LOSSES[kind](chosen - rw, rejected - rx, beta, smoothing)
    paper = PAPERS[kind]
    assert float(loss.detach()) == pytest.approx(paper(w, x, rw, rx, beta, smoothing), rel=1e-9, abs=1e-12)
    near_kink = kind == "hinge" and abs(1 - beta * (w - rw - x + rx)) < 1e-3
    if near_kink:
        return
    loss.backward()
    step = 1e-5
    slopes = [
        (
            paper(w + step * a, x + step * b, rw, rx, beta, smoothing)
            - paper(w - step * a, x - step * b, rw, rx, beta, smoothing)
        )
        / (2 * step)
        for a, b in ((1, 0), (0, 1))
    ]
    found = [float(x.grad) for x in (chosen, rejected) if x.grad is not None]
    assert found == pytest.approx(slopes, rel=1e-5, abs=1e-7)


def test_the_gradient_of_dpo_is_equation_seven() -> None:
    """-beta s(r_l - r_w) (grad log p(w) - grad log p(x)), r the implicit rewards."""
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (-3.0, -5.0))
    LOSSES["sigmoid"](chosen + 4.0, rejected + 4.5, 0.3, 0.0).backward()
    weight = 0.3 * s(0.3 * (-5.0 + 4.5) - 0.3 * (-3.0 + 4.0))
    assert float(chosen.grad) == pytest.approx(-weight, rel=1e-12)  # type: ignore[arg-type]
    assert float(rejected.grad) == pytest.approx(weight, rel=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", sorted(LIMITS))
def test_the_gradient_by_beta_goes_to_its_limit_as_beta_goes_to_zero(kind: str) -> None:
    beta = 1e-7
    c = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    LOSSES[kind](c, torch.tensor(-2.0, dtype=torch.float64), beta, 0.0).backward()
    assert float(c.grad) / beta == pytest.approx(LIMITS[kind], abs=1e-6)  # type: ignore[arg-type]


def test_the_loss_at_the_start_is_that_of_a_policy_that_is_its_reference() -> None:
    assert loss_at_start(DpoSection()) == pytest.approx(math.log(2))
    assert loss_at_start(DpoSection(loss="hinge")) == 1.0
    assert loss_at_start(DpoSection(loss="ipo", beta=0.5)) == 1.0
    assert loss_at_start(DpoSection(loss="apo-zero")) == 1.0


VOCABULARY, WIDTH = 11, 6


def head() -> Head:
    generator = torch.Generator().manual_seed(1)
    return Head(torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64), LossOptions())


def micro_of(rows: list[list[tuple[list[int], list[int]]]], length: int) -> dict[str, torch.Tensor]:
    """Rows of pairs of labels, one after another."""
    most = max(map(len, rows))
    labels = torch.full((len(rows), length), IGNORED)
    answer = torch.zeros_like(labels)
    for row, pairs in enumerate(rows):
        place = 0
        for number, pair in enumerate(pairs):
            for side, ids in enumerate(pair):
                labels[row, place : place + len(ids)] = torch.tensor(ids)
                answer[row, place : place + len(ids)] = 2 * number + side
                place += len(ids) + 1  # what is no target
    reference = torch.randn(len(rows), most, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pairs = torch.tensor([len(each) for each in rows])
    return {"shift_labels": labels, "answer": answer, "reference": reference, "pairs": pairs}


ROWS = [[([1, 2, 3], [4]), ([5], [6, 7])], [([8, 9], [1, 1, 2])], []]


@pytest.mark.parametrize("scores", ["sum", "mean"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_packed_pairs_are_scored_as_each_pair_alone(scores: str, weight: float) -> None:
    micro, chosen_head = micro_of(ROWS, 16), head()
    hidden = torch.randn(3, 16, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options = DpoSection(smoothing=0.05, scores=scores, chosen_weight=weight)
    found = preference(options)(chosen_head, hidden, micro)
    log_p = torch.log_softmax(chosen_head.logits(hidden), -1)
    total, margins = 0.0, []
    for row, pairs in enumerate(ROWS):
        place = 0
        for number, pair in enumerate(pairs):
            values = []
            for side, ids in enumerate(pair):
                parts = [float(log_p[row, place + index, token]) for index, token in enumerate(ids)]
                place += len(ids) + 1
                size = len(ids) if scores == "mean" else 1
                values.append(
                    (sum(parts) / size, float(micro["reference"][row, number, side]) / size, sum(parts) / len(ids))
                )
            (w, rw, likelihood), (x, rx, _) = values
            total += PAPERS["sigmoid"](w, x, rw, rx, 0.1, 0.05) - weight * likelihood
            margins.append(0.1 * (w - rw - x + rx))
    assert float(found.total) == pytest.approx(total, rel=1e-12)
    assert float(found.metrics["margin"][0]) == pytest.approx(sum(margins), rel=1e-12)
    assert float(found.metrics["accuracy"][0]) == sum(margin > 0 for margin in margins)
    assert int(found.metrics["accuracy"][1]) == 3
    assert found.rows is not None
    assert float(found.rows[2]) == 0.0


def test_a_row_without_pairs_gives_no_loss_and_no_gradient() -> None:
    micro = micro_of([[([1], [2])], []], 8)
    hidden = torch.randn(2, 8, WIDTH, dtype=torch.float64, requires_grad=True)
    preference(DpoSection(chosen_weight=0.1))(head(), hidden, micro).total.backward()
    assert hidden.grad is not None
    assert float(hidden.grad[1].abs().max()) == 0.0
    assert bool(torch.isfinite(hidden.grad).all())


def test_scores_of_an_answer_ignore_what_is_no_target() -> None:
    micro = micro_of([[([1, 2], [3])]], 8)
    sums, counts = pair_scores(head(), torch.zeros(1, 8, WIDTH, dtype=torch.float64), micro)
    assert counts.tolist() == [[[2.0, 1.0]]]
    assert sums[0, 0].tolist() == pytest.approx([-2 * math.log(VOCABULARY), -math.log(VOCABULARY)])
