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
from argonne.train.objectives import next_token, next_token_by_position, next_token_by_row

Nano = Callable[..., Recipe]


@pytest.mark.parametrize("objective", [next_token, next_token_by_row, next_token_by_position])
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
    metrics = {name: pair for name, pair in metrics.items() if "/" not in name}
    assert metrics == ({"z_loss": (pytest.approx(float(penalty)), 8)} if z_loss else {})


def by_position(length: int, **more: torch.Tensor) -> dict[str, tuple[float, int]]:
    """The bands of two rows in which the token at position p (from 0) costs p + 1 nats, and one target is left out."""

    class Costs:
        z_loss = 0.0

        def token_log_probs(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = -(1.0 + torch.arange(length)).expand(2, length) * (labels >= 0)
            return found, torch.zeros_like(found)

    labels = torch.zeros(2, length, dtype=torch.int64)
    labels[1, -1] = -100
    loss = next_token_by_position(Costs(), torch.zeros(2, length, 1), {"shift_labels": labels, **more})  # type: ignore[arg-type]
    assert sum(float(value) for value, _ in loss.metrics.values()) == pytest.approx(float(loss.total))
    return {name.partition("/")[2]: (float(value), int(count)) for name, (value, count) in loss.metrics.items()}


def test_the_loss_by_position_is_summed_in_bands_each_as_long_as_all_before_it() -> None:
    assert by_position(8) == {"1-1": (2, 2), "2-2": (4, 2), "3-4": (14, 4), "5-8": (5 + 6 + 7 + 8 + 5 + 6 + 7, 7)}
    assert list(by_position(11)) == ["1-1", "2-2", "3-5", "6-11"]
    assert list(by_position(3)) == ["1-1", "2-3"]


def test_a_position_is_the_one_that_the_model_is_given() -> None:
    begun_anew = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 4]])
    found = by_position(8, position_ids=begun_anew)
    assert found == {"1-1": (1 + 1 + 4, 3), "2-2": (2 + 2 + 5, 3), "3-4": (3 + 4 + 3 + 6 + 7, 5), "5-8": (26, 4)}


@pytest.mark.parametrize("documents", ["packed", "within"])
def test_held_out_text_is_told_by_position_too(nano: Nano, tmp_path: Path, documents: str) -> None:
    masked = {"data.document_mask": "true"} if documents == "packed" else {}
    run(nano(**{"data.documents": f'"{documents}"', "train.steps": "4", **masked}), tmp_path / "run")
    (record,) = read_metrics(tmp_path / "run").of("held_out")
    bands = {name.removeprefix("loss_by_position/"): value for name, value in record["metrics"].items()}
    assert list(bands) == ["1-4", "5-8", "9-16", "17-32"]
    assert min(bands.values()) < record["loss"] < max(bands.values())
    if documents == "within":  # as many tokens in each position
        weights = (4, 4, 8, 16)
        mean = sum(value * weight for value, weight in zip(bands.values(), weights, strict=True)) / 32
        assert mean == pytest.approx(record["loss"], rel=1e-5)


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
        assert "z_loss" not in plain.get("metrics", {})
    assert told["penalised"][1]["bits_per_byte"] == pytest.approx(told["plain"][1]["bits_per_byte"], rel=1e-6)
    assert told["penalised"][0]["grad_norm"] > 1.01 * told["plain"][0]["grad_norm"]
