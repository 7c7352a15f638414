"""Optimizers: groups, skipped steps, Muon against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from argonne.config import OptimSection
from argonne.train.muon import orthogonalise
from argonne.train.optim import build_optimizer, optimizer_tensors, parameter_groups, step_where_finite
from argonne.train.schedule import set_learning_rate


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6, bias=False)])
        self.norm = nn.LayerNorm(6)
        self.inner = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 9), nn.Linear(9, 6)])})


def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def give_gradients(tiny: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in tiny.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_matrices_decay_and_embeddings_gains_and_biases_do_not(name: str) -> None:
    groups = parameter_groups(model(), OptimSection(name=name, weight_decay=0.1))
    decayed = {name for group in groups if group["weight_decay"] > 0 for name in group["names"]}
    assert {"layers.0.weight", "inner.layers.1.weight"} <= decayed
    assert not {"embed.weight", "layers.0.bias", "norm.weight", "norm.bias"} & decayed


def test_a_head_that_shares_the_embeddings_weight_does_not_decay_by_another_name() -> None:
    tied = nn.ModuleDict({"a_head": nn.Linear(6, 7, bias=False), "embed": nn.Embedding(7, 6)})
    tied["embed"].weight = tied["a_head"].weight
    assert [group["weight_decay"] for group in parameter_groups(tied, OptimSection(weight_decay=0.1))] == [0.0]


def test_decay_all_decays_everything_and_no_parameter_is_lost() -> None:
    tiny = model()
    groups = parameter_groups(tiny, OptimSection(decay_all=True))
    assert {group["weight_decay"] for group in groups} == {0.1}
    assert sorted(name for group in groups for name in group["names"]) == sorted(
        name for name, _ in tiny.named_parameters()
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_leaves_weights_and_state_untouched(name: str, bad: float) -> None:
    tiny = model()
    optimizer = build_optimizer(tiny, OptimSection(name=name))
    give_gradients(tiny, 1)
    assert step_where_finite(optimizer, torch.tensor(1.0)).item() == 0
    weights = copy.deepcopy(tiny.state_dict())
    state = {key: tensor.clone() for key, tensor in optimizer_tensors(optimizer).items()}
    give_gradients(tiny, 2)
    tiny.norm.weight.grad[0] = bad
    assert step_where_finite(optimizer, torch.tensor(bad)).item() == 1
    assert all(torch.equal(weights[key], value) for key, value in tiny.state_dict().items())
    assert all(torch.equal(state[key], value) for key, value in optimizer_tensors(optimizer).items())
    give_gradients(tiny, 3)
    step_where_finite(optimizer, torch.tensor(1.0))
    assert not any(torch.equal(weights[key], value) for key, value in tiny.state_dict().items())


def test_the_state_has_flat_names_that_carry_the_parameter() -> None:
    tensors = optimizer_tensors(build_optimizer(model(), OptimSection(name="muon")))
    assert "optim.exp_avg.embed.weight" in tensors
    assert "optim.momentum.inner.layers.0.weight" in tensors


def test_a_rate_is_applied_to_every_group_as_a_share_of_its_own_peak() -> None:
    optimizer = build_optimizer(model(), OptimSection(name="muon", lr=1e-3, muon_lr=0.02))
    set_learning_rate(optimizer, 5e-4, 1e-3)
    assert sorted({round(group["lr"], 9) for group in optimizer.param_groups}) == [5e-4, 0.01]


def test_muon_equals_the_one_of_torch() -> None:
    ours, reference = model(), model()
    optimizer = build_optimizer(ours, OptimSection(name="muon", muon_lr=0.02, weight_decay=0.1, muon_dtype="bfloat16"))
    matrices = [
        parameter for name, parameter in reference.named_parameters() if parameter.ndim == 2 and ".layers." in name
    ]
    other = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95)
    for seed in range(5):
        give_gradients(ours, seed)
        give_gradients(reference, seed)
        optimizer.step()
        other.step()
    for (name, mine), (_, theirs) in zip(ours.named_parameters(), reference.named_parameters(), strict=True):
        if mine.ndim == 2 and ".layers." in name:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (16, 4)])
def test_an_orthogonalised_matrix_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singular = torch.linalg.svdvals(orthogonalise(matrix, torch.float64))
    assert 0.6 < singular.min() <= singular.max() < 1.3
