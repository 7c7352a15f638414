"""Products by oneDNN: the same layers, multiplied by another library."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from argonne.model import loss, products
from argonne.model.products import LinearByOneDNN, multiply_by_onednn
from tests.serve.test_engine import make_model

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The inputs that oneDNN was given."""
    seen, real = [], products.product

    def product(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return real(x, *others)

    monkeypatch.setattr(products, "product", product)
    return seen


def made(inputs: int, outputs: int, **how: object) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, **how)
    multiply_by_onednn(layer)
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 3, 4), (0, 4)])
def test_values_and_gradients_are_those_of_a_linear_layer(
    multiplied: list[torch.Size], shape: tuple[int, ...], bias: bool
) -> None:
    draw = torch.Generator().manual_seed(0)
    layer = made(24, 40, bias=bias)
    x = torch.randn(*shape, 24, generator=draw, requires_grad=True)
    upstream = torch.randn(*shape, 40, generator=draw)
    found = layer(x)
    assert len(multiplied) == 1
    gradients = torch.autograd.grad(found, [x, *layer.parameters()], upstream)
    assert len(multiplied) == 2  # the derivative of x too
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, [x, *layer.parameters()], upstream)
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_other_dtypes_and_autocast_are_left_to_torch(multiplied: list[torch.Size]) -> None:
    made(8, 8, dtype=torch.float64)(torch.ones(2, 8, dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(8, 8)(torch.ones(2, 8)).dtype == torch.bfloat16
    assert not multiplied


def test_a_frozen_weight_gets_no_gradient_and_passes_one_on() -> None:
    frozen = made(8, 8).requires_grad_(False)
    x = torch.ones(2, 8, requires_grad=True)
    frozen(x).sum().backward()
    torch.testing.assert_close(x.grad, frozen.weight.sum(0).expand(2, 8))


def test_layers_that_are_computed_again_give_the_same_gradients() -> None:
    layer = nn.Sequential(made(8, 8), nn.Tanh(), made(8, 8))
    x = torch.randn(3, 8, requires_grad=True)
    (kept,) = torch.autograd.grad(layer(x).sum(), x)
    (again,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)
    assert torch.equal(kept, again)


def test_names_weights_and_other_layers_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = copy.deepcopy(model.state_dict())
    multiply_by_onednn(model)
    assert isinstance(model[0], nn.Linear)
    assert type(model[0]) is LinearByOneDNN
    assert type(model[1]) is nn.LayerNorm
    assert before.keys() == model.state_dict().keys()
    assert type(copy.deepcopy(model)[0]) is LinearByOneDNN


def test_the_loss_multiplies_as_the_layer_of_the_head_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    ids, seen, real = torch.arange(24)[None], [], loss.product

    def product(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return real(x, *others)

    monkeypatch.setattr(loss, "product", product)
    before = model(input_ids=ids, shift_labels=ids, use_cache=False).loss
    assert not seen
    multiply_by_onednn(model)
    after = model(input_ids=ids, shift_labels=ids, use_cache=False).loss
    assert [shape[-1] for shape in seen] == [model.config.hidden_size, model.config.vocab_size]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
