"""Objectives: what is trained, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from argonne.config import Recipe
from argonne.model.loss import Head, LossOptions
from argonne.parallel.objective import Objective
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from argonne.train.objectives import next_token, next_token_by_row

Nano = Callable[..., Recipe]


@pytest.mark.parametrize("objective", [next_token, next_token_by_row])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_the_penalty_is_part_of_what_is_trained_and_no_part_of_the_loss_that_is_told(
    objective: Objective, z_loss: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[1, 2, -100, 0, 6], [3, -100, 5, 4, 1]])
    found = objective(Head(weight, LossOptions(z_loss=z_loss)), hidden, {"shift_labels": labels})
    logits = (hidden @ weight.t()).flatten(0, 1)
    entropy = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    penalty = z_loss * (logits.logsumexp(-1).square() * (labels.flatten() >= 0)).sum()
    assert found.total == pytest.approx(float(entropy + penalty))
    assert float(found.total - found.penalty) == pytest.approx(float(entropy))
    assert not torch.as_tensor(found.penalty).requires_grad
    metrics = {name: (float(value), int(count)) for name, (value, count) in found.metrics.items()}
    assert metrics == ({"z_loss": (pytest.approx(float(penalty)), 8)} if z_loss else {})


def test_a_run_with_z_loss_tells_the_cross_entropy_and_the_penalty_apart(nano: Nano, tmp_path: Path) -> None:
    told = {}
    for name, z_loss in (("plain", "0.0"), ("penalised", "0.1")):
        keys = {"train.steps": "4", "train.z_loss": z_loss, "optim.lr": "1e-12", "eval.windows": "2"}
        run(nano(**keys), tmp_path / name)
        metrics = read_metrics(tmp_path / name)
        told[name] = (metrics.of("step")[0], metrics.of("held_out")[0])
    for plain, penalised in zip(told["plain"], told["penalised"], strict=True):
        assert penalised["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        assert penalised["metrics"]["z_loss"] > 1
        assert "metrics" not in plain
    assert told["penalised"][1]["bits_per_byte"] == pytest.approx(told["plain"][1]["bits_per_byte"], rel=1e-6)
    assert told["penalised"][0]["grad_norm"] > 1.01 * told["plain"][0]["grad_norm"]
