"""Products in int8 against the same arithmetic in float64, whatever the sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import caching
from torch import Tensor

from argonne.errors import InputError
from argonne.serve import compiled, int8
from argonne.serve.quantize import Int8Linear

SIZES = st.integers(1, 70)


def layer_of(outputs: int, inputs: int, seed: int = 0) -> Int8Linear:
    return Int8Linear.rounded(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)), None)


def rows_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def expected(layer: Int8Linear, x: Tensor) -> Tensor:
    """x (rows, in), rounded as a row of fp32 is, by the weights; in float64."""
    step = x.float().abs().amax(1, keepdim=True) / 127
    return (
        (x.float() / step).round().double() * step.double() @ (layer.whole.double() * layer.scale.double()[:, None]).T
    )


@given(SIZES, SIZES)
def test_weights_come_back_as_they_were(outputs: int, inputs: int) -> None:
    draw = torch.Generator().manual_seed(outputs)
    whole = torch.randint(-127, 128, (outputs, inputs), generator=draw, dtype=torch.int8)
    assert torch.equal(int8.unpacked(int8.packed(whole), outputs, inputs), whole)


@settings(deadline=None)
@given(st.integers(1, 20), SIZES, SIZES)
def test_the_product_is_that_of_whole_numbers(rows: int, outputs: int, inputs: int) -> None:
    layer, x = layer_of(outputs, inputs), rows_of(rows, inputs)
    assert torch.allclose(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "inputs"), [(1, 512), (2, 256), (4, 128), (8, 64), (8, 128), (9, 64)])
def test_rounded_rows_are_held_until_they_are_multiplied(rows: int, inputs: int) -> None:
    """As large as the sums of a block, for which memory that was given back too soon would be taken."""
    layer, x = layer_of(200, inputs), rows_of(rows, inputs)
    for _ in range(5):
        assert torch.allclose(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_what_stands_before_and_behind_a_product_is_done_as_in_calls_of_its_own(rows: int) -> None:
    """But for a number here and there that lies between two whole ones and is rounded to the other."""
    layer, x, gain, plus = layer_of(40, 48), rows_of(rows, 48), 1 + rows_of(48) / 10, rows_of(rows, 40)
    gate, up = rows_of(rows, 96).chunk(2, -1)
    found = {
        "normed": (layer.product(x, norm=(gain, 0.1)), F.rms_norm(x, (48,), gain, 0.1)),
        "gated": (layer.product(torch.cat((gate, up), -1), gated=True), F.silu(gate) * up),
    }
    for product, rounded in found.values():
        other = rounded.abs().amax(1, keepdim=True) / 127 * layer.weight.abs().amax(1)  # by one number
        assert bool(((product - expected(layer, rounded)).abs() <= 1.001 * other + 1e-5).all())
    assert torch.equal(layer.product(x, plus=plus), layer.product(x) + plus)


def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    layer, x = layer_of(200, 300), rows_of(13, 600)
    many = [layer.product(rows, gated=True) for rows in (x, x[:3])]
    torch.set_num_threads(1)
    assert torch.equal(many[0], layer.product(x, gated=True))
    assert torch.equal(many[1], layer.product(x[:3], gated=True))


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_not_rounded_away(rows: int, number: float) -> None:
    layer, x = layer_of(20, 24), rows_of(rows, 48)
    x[-1, 30] = number
    for found in (layer.product(x[:, 24:]), layer.product(x, gated=True), layer.product(x, plus=None, gated=True)):
        assert bool(found[-1].isnan().all())
        assert bool(found[:-1].isfinite().all())
    normed = layer.product(x[:, 24:], norm=(torch.ones(24), 1e-6))
    assert bool(normed[-1].isnan().all())


ELSEWHERE = """
import sys, torch
from tests.serve.test_int8 import layer_of, rows_of
torch.save([layer_of(40, 130)(rows_of(rows, 130)) for rows in (1, 2, 4, 8, 17)], sys.argv[1])
"""


def test_a_processor_without_these_instructions_gives_the_same_bits(tmp_path: Path) -> None:
    path = tmp_path / "found.pt"
    env = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(path)], env=env, check=True, cwd=Path(__file__).parents[2])
    for found, rows in zip(torch.load(path), (1, 2, 4, 8, 17), strict=True):
        assert torch.equal(found, layer_of(40, 130)(rows_of(rows, 130)))


def test_the_largest_sum_is_held() -> None:
    rows, inputs = 3, int8.MOST_INPUTS
    layer = Int8Linear(torch.full((2, inputs), 127, dtype=torch.int8), torch.ones(2), None)
    for x in (torch.ones(rows, inputs), -torch.ones(rows, inputs)):
        assert torch.allclose(layer(x), x[:, :1].expand(rows, 2) * 127 * inputs, rtol=1e-6)
    with pytest.raises(InputError, match=f"{inputs + 1:,} inputs, expected {inputs:,} at most"):
        int8.packed(torch.zeros(2, inputs + 1, dtype=torch.int8))


def test_what_was_compiled_need_not_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only installation and no home: then each start compiles anew."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    layer, x = layer_of(20, 24), rows_of(2, 24)
    before = layer(x)
    int8._teams.cache_clear()
    assert torch.equal(layer(x), before)


def test_another_openmp_than_torchs_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(40, 24), rows_of(12, 24)
    before = layer(x)
    monkeypatch.setattr(compiled.ctypes, "CDLL", lambda path: object())
    int8._teams.cache_clear()
    try:
        assert torch.equal(layer(x), before)
    finally:
        int8._teams.cache_clear()
