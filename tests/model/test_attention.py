"""Every mask on every path against the plain formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.model import ArgonneForCausalLM
from argonne.model.attention import Pattern, segments_of
from argonne.model.kernels import math_attention, run_kernel, sdpa_attention

Make = Callable[..., ArgonneForCausalLM]


def tensors(
    rows: int, length: int, heads: int = 4, shared: int = 2, width: int = 6, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, shared, shared)
    return [
        torch.randn(rows, n, length, width, generator=generator, dtype=torch.float64, requires_grad=True) for n in sizes
    ]


def positions_of(lengths: list[int], total: int) -> torch.Tensor:
    """Positions that restart with each document; one more fills the row."""
    row = torch.cat([torch.arange(n) for n in [*lengths, total]])
    return row[:total]


def brute_force(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position_ids: torch.Tensor | None, window: int | None
) -> torch.Tensor:
    """One query at a time: the keys it may see, by the words of the contract."""
    rows, heads, length, width = q.shape
    out = torch.zeros(rows, length, heads, width, dtype=q.dtype)
    for row in range(rows):
        for i in range(length):
            start = i - int(position_ids[row, i]) if position_ids is not None else 0
            if window is not None:
                start = max(start, i - window + 1)
            for head in range(heads):
                shared = head // (heads // k.shape[1])
                scores = k[row, shared, start : i + 1] @ q[row, head, i] / width**0.5
                out[row, i, head] = torch.softmax(scores, 0) @ v[row, shared, start : i + 1]
    return out


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 90),
    window=st.one_of(st.none(), st.integers(1, 90)),
    documents=st.one_of(st.none(), st.lists(st.lists(st.integers(1, 50), max_size=4), min_size=2, max_size=2)),
    seed=st.integers(0, 9),
)
def test_sdpa_and_math_see_exactly_what_the_contract_says(
    length: int, window: int | None, documents: list[list[int]] | None, seed: int
) -> None:
    q, k, v = tensors(2, length, seed=seed)
    position_ids = None if documents is None else torch.stack([positions_of(row, length) for row in documents])
    segments = segments_of(position_ids, None, (2, length), torch.device("cpu"))
    plan = Pattern(window if window is not None and window < length else None, segments)  # type: ignore[arg-type]
    expected = brute_force(q, k, v, position_ids, window)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exact = torch.autograd.grad(expected, (q, k, v), upstream)
    for found in (math_attention(q, k, v, plan, 6**-0.5, 0.0), sdpa_attention(q, k, v, plan, 6**-0.5, 0.0)[0]):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(torch.autograd.grad(found, (q, k, v), upstream), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [1, 2, 30, 31, 32, 33, 34, 63, 64, 65, 69])
@pytest.mark.parametrize("length", [32, 33, 64, 65, 70])
def test_windows_around_the_size_of_a_block_are_exact(window: int, length: int) -> None:
    q, k, v = tensors(1, length, heads=2, shared=1)
    plan = Pattern(window if window < length else None)
    found = sdpa_attention(q, k, v, plan, 6**-0.5, 0.0)[0]
    torch.testing.assert_close(found, math_attention(q, k, v, plan, 6**-0.5, 0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("generation", ["1", "2", "3", "3-window"])
def test_a_packed_row_equals_its_documents_alone(generation: str, make_model: Make) -> None:
    model = make_model(generation)
    lengths = [[13, 1, 26], [40]]
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([positions_of(row, 40) for row in lengths])
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    start = 0
    for length in lengths[0]:
        alone = model(input_ids=ids[:1, start : start + length], use_cache=False).logits
        torch.testing.assert_close(packed[:1, start : start + length], alone, rtol=0, atol=1e-11)
        start += length
    torch.testing.assert_close(packed[1:], model(input_ids=ids[1:], use_cache=False).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kernel", ["sdpa", "math"])
@pytest.mark.parametrize("generation", ["1", "2", "3", "3-window"])
def test_the_future_never_reaches_the_past(generation: str, kernel: str, make_model: Make, ids: torch.Tensor) -> None:
    model = make_model(generation)
    model.configure_training(attention=kernel)
    changed = ids.clone()
    changed[:, 25] = (changed[:, 25] + 1) % 97
    before, after = (model(input_ids=x, use_cache=False).logits for x in (ids, changed))
    assert torch.equal(before[:, :25], after[:, :25])
    assert (before[:, 25:] - after[:, 25:]).abs().amax((0, 2)).min() > 1e-9


def test_a_token_beyond_the_window_is_out_of_reach(make_model: Make, ids: torch.Tensor) -> None:
    model = make_model("3-window", layer_types=["sliding_attention"] * 4, sliding_window=3)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 97
    moved = (model(input_ids=ids).logits - model(input_ids=changed).logits).abs().amax((0, 2))
    assert (moved[:9] > 0).all()  # four layers of 3 keys reach back 4 x 2
    assert not moved[9:].any()


def test_the_paths_taken_are_reported(make_model: Make, ids: torch.Tensor) -> None:
    model = make_model("3-window")
    assert model.attention_paths() == ["not run yet"] * 4
    model(input_ids=ids, use_cache=False)
    assert model.attention_paths() == ["sdpa-causal", "sdpa-window-blocks"] * 2
    model(input_ids=ids, position_ids=positions_of([9], 40).expand(2, -1), use_cache=False)
    assert model.attention_paths() == ["sdpa-documents", "sdpa-documents-window"] * 2
    model.configure_training(attention="math")
    model(input_ids=ids, use_cache=False)
    assert model.attention_paths() == ["math"] * 4


@pytest.mark.parametrize("generation", ["1", "2", "3-window"])
def test_bf16_autocast_takes_the_fused_kernel_and_never_the_plain_one(
    generation: str, make_model: Make, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # where blocks are no faster
    model = make_model(generation, dtype=torch.float32, attention_dropout=0.0).train()  # no CPU kernel fuses dropout
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(input_ids=ids, shift_labels=ids, loss_reduction="sum", use_cache=False).loss.backward()
    ran = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in ran
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in ran
    assert "aten::_scaled_dot_product_attention_math" not in ran


@pytest.mark.parametrize("generation", ["1", "2", "3-window"])
def test_autocast_hands_bf16_queries_keys_and_values_to_the_kernel(
    generation: str, make_model: Make, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 gains and rotary tables promote: without a cast behind them no fused CUDA kernel would run."""
    handed: list[torch.dtype] = []

    def spy(kernel: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
        handed.extend(x.dtype for x in (query, key, value))
        return run_kernel(kernel, query, key, value, *rest)

    monkeypatch.setattr("argonne.model.attention.run_kernel", spy)
    model = make_model(generation, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, use_cache=False)
    assert handed == [torch.bfloat16] * 12
