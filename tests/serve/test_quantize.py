"""Weights in int8: what is rounded, and that nothing else happens."""

from __future__ import annotations

import copy
import itertools
import sys

import pytest
import torch
from torch import nn

from argonne.errors import InputError
from argonne.serve.decoder import Decoder
from argonne.serve.options import SamplingOptions
from argonne.serve.products import LARGE, joined, product_of
from argonne.serve.quantize import Int8Linear, Part, in_a_row, on_large_pages, pack, quantize
from tests.serve.test_engine import make_model


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


def rounded(inputs: int, outputs: int, bias: bool = False) -> Int8Linear:
    layer = linear(inputs, outputs, bias)
    return Int8Linear.rounded(layer.weight, layer.bias)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_product_is_that_of_the_rounded_weights_and_the_rounded_rows(rows: int) -> None:
    layer, x = linear(96, 64, bias=True), torch.randn(rows, 96)
    scale = layer.weight.abs().amax(1, keepdim=True) / 127
    weight = (layer.weight / scale).round().double() * scale.double()
    step = x.abs().amax(1, keepdim=True) / 127
    expected = (x / step).round().double() * step @ weight.T + layer.bias.double()
    found = Int8Linear.rounded(layer.weight, layer.bias)
    assert torch.allclose(found(x).double(), expected, atol=1e-5)
    assert torch.allclose(found.weight.double(), weight, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 64])
def test_the_largest_values_do_not_overflow(rows: int) -> None:
    layer = linear(256, 8)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    for x in (torch.ones(rows, 256), -torch.ones(rows, 256)):
        found = Int8Linear.rounded(layer.weight, None)(x)
        assert torch.allclose(found, x.sum(1, keepdim=True).expand(rows, 8) * 0.5, rtol=1e-5)


@pytest.mark.parametrize("rows", [2, 8, 9, 64])
def test_a_row_depends_neither_on_its_neighbours_nor_on_their_number(rows: int) -> None:
    layer = rounded(96, 64)
    x = torch.randn(rows, 96)
    other = torch.cat((x[:1], 100 * torch.randn(rows - 1, 96)))
    assert torch.equal(layer(x)[0], layer(other)[0])
    assert torch.equal(layer(x)[0], layer(x[:1])[0])


@pytest.mark.parametrize("rows", [1, 9])
def test_a_row_of_zeros_gives_zeros_and_one_that_is_not_finite_stays_so(rows: int) -> None:
    layer = rounded(96, 64)
    assert torch.equal(layer(torch.zeros(rows, 96)), torch.zeros(rows, 64))
    assert layer(torch.full((rows, 96), float("nan"))).isnan().all()
    x = torch.randn(rows, 96)
    x[0, 3] = float("inf")
    assert not layer(x)[0].isfinite().any()


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("size", [1e-25, 1, 1e25])
def test_small_and_large_rows_have_steps_of_their_own(rows: int, size: float) -> None:
    layer, x = rounded(96, 64, bias=False), torch.randn(rows, 96)
    assert torch.allclose(layer(x * size), layer(x) * size, rtol=0.02, atol=0.02 * size)


@pytest.mark.parametrize("bias", [False, True])
def test_layers_side_by_side_give_what_each_gives(bias: bool) -> None:
    block = nn.Module()
    for name, size in (("q_proj", 32), ("k_proj", 16), ("v_proj", 64)):
        setattr(block, name, rounded(96, size, bias))
    names, x = ("q_proj", "k_proj", "v_proj"), torch.randn(2, 3, 96)
    before = [(layer.weight, layer(x)) for layer in (getattr(block, name) for name in names)]
    pack(block)
    parts = [getattr(block, name) for name in names]
    assert all(isinstance(part, Part) for part in parts)
    assert len({part.together for part in parts}) == 1
    for part, (weight, found) in zip(parts, before, strict=True):
        assert torch.equal(part.weight, weight)
        assert torch.equal(part(x), found)
    assert torch.equal(joined(*parts)(x), torch.cat([found for _, found in before], -1))


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_of_a_large_matrix_is_the_layers_whatever_the_other_rows_are(rows: int, bias: bool) -> None:
    layer = linear(512, LARGE // 512, bias)
    x, other = torch.randn(2, rows, 512)
    other[0] = x[0]
    with torch.inference_mode():
        product = product_of(layer.weight, layer.bias)
        assert torch.allclose(product(x), layer(x), atol=1e-5)
        assert torch.equal(product(x)[0], product(other)[0])
        assert torch.equal(joined(layer, layer)(x), torch.cat((product(x), product(x)), -1))


@pytest.mark.parametrize("generation", ["nano-1.0", "nano-2.5", "nano-3.0"])
def test_a_rounded_model_answers_as_its_own_passes_say(generation: str) -> None:
    model = make_model(generation, max_position_embeddings=256).eval()
    exact, ids = copy.deepcopy(model), torch.arange(30)[None]
    quantize(model)
    pack(model)
    with torch.no_grad():
        rounded, whole = model(input_ids=ids, use_cache=False).logits, exact(input_ids=ids, use_cache=False).logits
    assert 0 < float((rounded - whole).abs().max()) < 0.1 * float(whole.abs().max())
    decoder = Decoder(model, rows=2)
    answer = decoder.submit(ids[0].tolist(), SamplingOptions(max_new_tokens=8, temperature=0.0), [])
    while decoder.busy:
        decoder.step()
    found = list(answer.ids)
    for count in range(8):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids[0].tolist(), *found[:count]]]), use_cache=False).logits[0, -1]
        assert float(logits.max() - logits[found[count]]) <= 0.02 * float(logits.abs().max())


@pytest.mark.parametrize("generation", ["nano-1.0", "nano-2.5", "nano-3.0"])
def test_a_decoder_of_a_rounded_model_unpacks_no_weight(generation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For 85M parameters that took as long as a dozen tokens, each time one was made."""

    def unpacked(layer: Int8Linear) -> torch.Tensor:
        raise AssertionError("a weight was unpacked")

    model = make_model(generation, max_position_embeddings=256).eval()
    quantize(model)
    pack(model)
    monkeypatch.setattr(Int8Linear, "whole", property(unpacked))
    assert Decoder(model, rows=2)._pass is not None


def test_the_loss_of_a_rounded_model_is_that_of_its_logits() -> None:
    model = make_model().eval()
    quantize(model)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        labels = torch.cat((ids[:, 1:], torch.tensor([[-100]])), 1)
        found = model(input_ids=ids, shift_labels=labels, use_cache=False).loss
    assert abs(float(found - expected)) < 0.01


def test_only_a_cpu_is_taken() -> None:
    with pytest.raises(InputError, match="--quantize int8: is for x86 CPUs"):
        quantize(make_model().to("meta"))


def test_rounded_weights_lie_one_behind_the_other_as_they_were() -> None:
    model = make_model().eval()
    quantize(model)
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    for layer, moved in zip(layers, on_large_pages([layer.packed for layer in layers]), strict=True):
        assert torch.equal(moved, layer.packed)
        assert moved.data_ptr() % 64 == 0  # as the instructions read them
    pack(model)
    places = sorted(
        (module.packed.data_ptr(), module.packed.numel())
        for module in model.modules()
        if isinstance(module, Int8Linear)
    )
    assert all(first + size <= second < first + size + 64 for (first, size), (second, _) in itertools.pairwise(places))


def test_without_numba_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    model = make_model()
    with pytest.raises(InputError, match=r"needs numba, which is not installed; install argonne\[int8\]"):
        quantize(model)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


def test_matrices_that_only_happen_to_lie_behind_one_another_are_not_one() -> None:
    memory = torch.zeros(64)
    first, second = (torch.frombuffer(memory.numpy()[at : at + 32], dtype=torch.float32).view(4, 8) for at in (0, 32))
    assert first.data_ptr() + 4 * first.numel() == second.data_ptr()
    assert in_a_row([first, second]) is None
    both = torch.zeros(8, 8)
    assert torch.equal(in_a_row(list(both.split([3, 5]))), both)
    assert in_a_row([both[:3], both[4:]]) is None
