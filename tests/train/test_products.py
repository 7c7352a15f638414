"""Products by oneDNN: the same layers, multiplied by another library."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from argonne.plan import processor
from argonne.train import products
from argonne.train.optim import Precision
from argonne.train.products import ByOneDNN, faster_by_onednn

CPU = torch.device("cpu")
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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 4), (0, 4)])
def test_values_and_gradients_are_those_of_a_linear_layer(
    multiplied: list[torch.Size], shape: tuple[int, ...], bias: bool
) -> None:
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(*shape, 24, generator=draw, requires_grad=True)
    upstream = torch.randn(*shape, 40, generator=draw)
    with ByOneDNN():
        found = layer(x)
    assert len(multiplied) == 1
    gradients = torch.autograd.grad(found, [x, *layer.parameters()], upstream)
    assert len(multiplied) == 2  # the derivative of x too
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, [x, *layer.parameters()], upstream)
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_other_dtypes_and_frozen_weights_are_left_as_they_are(multiplied: list[torch.Size]) -> None:
    with ByOneDNN():
        nn.Linear(8, 8, dtype=torch.float64)(torch.ones(2, 8, dtype=torch.float64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert nn.Linear(8, 8)(torch.ones(2, 8)).dtype == torch.bfloat16
    frozen = nn.Linear(8, 8).requires_grad_(False)
    x = torch.ones(2, 8, requires_grad=True)
    with ByOneDNN():
        frozen(x).sum().backward()
    torch.testing.assert_close(x.grad, frozen.weight.sum(0).expand(2, 8))


@pytest.mark.parametrize(("vendor", "on"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_it_is_taken_on_processors_that_mkl_is_not_made_for(
    monkeypatch: pytest.MonkeyPatch, vendor: str, on: bool
) -> None:
    monkeypatch.setattr(products, "vendor", lambda: vendor)
    assert faster_by_onednn(CPU) is on
    assert not faster_by_onednn(torch.device("cuda"))
    assert isinstance(Precision("fp32", CPU).autocast(), ByOneDNN) is on
    assert not isinstance(Precision("bf16", CPU).autocast(), ByOneDNN)
    assert processor.AMD == "AuthenticAMD"
