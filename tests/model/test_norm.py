"""The norm as a CPU computes it in training, held to its plain lines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from argonne.model.layers import ArgonneRMSNorm


def plain(norm: ArgonneRMSNorm, x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * normed.to(x.dtype)


def made(size: int, dtype: torch.dtype = torch.float64) -> ArgonneRMSNorm:
    norm = ArgonneRMSNorm(size, 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(1))
    return norm


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 4, 8)])
def test_value_and_gradients_equal_those_of_the_plain_lines(shape: tuple[int, ...]) -> None:
    norm = made(shape[-1])
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found, expected = norm(x), plain(norm, x)
    assert "_RMSNorm" in type(found.grad_fn).__name__
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(found)
    mine = torch.autograd.grad(found, [x, norm.weight], upstream)
    theirs = torch.autograd.grad(expected, [x, norm.weight], upstream)
    for gradient, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_its_own_derivative_is_right_and_can_be_differentiated_again() -> None:
    norm = made(5)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,))


def test_functional_gradients_of_each_row_are_those_of_the_row_alone() -> None:
    norm = made(5)
    x = torch.randn(3, 5, dtype=torch.float64)
    rows = torch.func.vmap(torch.func.grad(lambda row: norm(row).pow(3).sum()))(x)
    for row, found in zip(x, rows, strict=True):
        alone = row.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(plain(norm, alone).pow(3).sum(), alone)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_input_is_rounded_as_the_plain_lines_round_it(dtype: torch.dtype) -> None:
    norm = made(16, torch.float32)
    x = torch.randn(8, 16).to(dtype).requires_grad_()
    found, expected = norm(x), plain(norm, x)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_a_gain_alone_or_an_input_alone_gets_its_gradient() -> None:
    norm, x = made(6), torch.randn(4, 6, dtype=torch.float64)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    frozen = made(6).requires_grad_(False)
    x.requires_grad_()
    frozen(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_same_bits_whether_it_is_differentiated_or_not(dtype: torch.dtype) -> None:
    """A policy is read with gradients, its reference without: at the start no score of theirs may differ."""
    norm = made(96, dtype)
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        alone = norm(x)
    assert torch.equal(norm(x), alone)
