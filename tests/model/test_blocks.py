"""A CPU's attention in blocks, held to the plain formula; where it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from argonne.model import ArgonneForCausalLM, blocks
from argonne.model.blocks import block_attention, first_seen
from argonne.model.fused import Pattern, Segments
from argonne.model.kernels import choose_kernel, math_attention, sdpa_attention, visible

Make = Callable[..., ArgonneForCausalLM]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def drawn(rows: int, length: int, heads: int, shared: int, width: int, spread: float = 1.0) -> list[Tensor]:
    """Queries, keys, values as a model's projections leave them, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, shared, shared, heads)
    q, k, v, up = (torch.randn(rows, length, n, width, generator=generator, dtype=torch.float64) for n in sizes)
    return [*(x.transpose(1, 2) for x in (q * spread, k, v)), up]


def with_gradients(attend: Attention, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    *given, up = (x.to(dtype) for x in tensors)
    leaves = [x.detach().requires_grad_() for x in given]
    found = attend(*leaves)
    return [found.detach(), *torch.autograd.grad(found, leaves, up)]


def documents(rows: int, length: int, cuts: set[int]) -> Segments:
    whole = {row * length for row in range(rows + 1)}
    return Segments.of(
        torch.tensor(sorted(whole | {cut % (rows * length) for cut in cuts})), length, torch.device("cpu")
    )


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    rows=st.integers(1, 3),
    length=st.integers(1, 40),
    shared=st.integers(1, 3),
    group=st.integers(1, 3),
    window=st.none() | st.integers(1, 45),
    cuts=st.none() | st.sets(st.integers(0, 119), max_size=8),
    queries=st.integers(1, 16),
    scores=st.sampled_from([1, 300, 2000, 10**6]),
)
def test_values_and_gradients_are_those_of_the_formula(
    rows: int, length: int, shared: int, group: int, window: int | None, cuts: Any, queries: int, scores: int
) -> None:
    pattern = Pattern(window, None if cuts is None else documents(rows, length, cuts))
    tensors = drawn(rows, length, shared * group, shared, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "QUERIES", queries)
        patch.setattr(blocks, "SCORES", scores)
        found = with_gradients(lambda q, k, v: block_attention(q, k, v, pattern, 0.3), tensors, torch.float64)
    exact = with_gradients(lambda q, k, v: math_attention(q, k, v, pattern, 0.3, 0.0), tensors, torch.float64)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def error(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_in_bf16_it_is_as_near_to_the_formula_as_torchs_kernel_also_where_scores_are_large(spread: float) -> None:
    """Scores rounded to bf16 would be four times as far away."""
    tensors = [x.bfloat16().double() for x in drawn(2, 300, 6, 2, 64, spread)]
    ours, torchs, formula = (
        lambda q, k, v: block_attention(q, k, v, Pattern(), 0.125),
        lambda q, k, v: sdpa_attention(q, k, v, Pattern(), 0.125, 0.0)[0],
        lambda q, k, v: math_attention(q, k, v, Pattern(), 0.125, 0.0),
    )
    exact = with_gradients(formula, tensors, torch.float64)
    found = error(with_gradients(ours, tensors, torch.bfloat16), exact)
    assert max(found) < 5e-3
    for mine, theirs in zip(found, error(with_gradients(torchs, tensors, torch.bfloat16), exact), strict=True):
        assert mine < 1.6 * theirs


def test_the_gradients_of_torch_func_are_those_of_the_backward_pass() -> None:
    q, k, v, up = (x.bfloat16() for x in drawn(2, 70, 4, 2, 16))

    def product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (block_attention(q, k, v, Pattern(), 0.25) * up).sum()

    expected = with_gradients(lambda *x: block_attention(*x, Pattern(), 0.25), [q, k, v, up], torch.bfloat16)[1:]
    for one, other in zip(torch.func.grad(product, argnums=(0, 1, 2))(q, k, v), expected, strict=True):
        assert torch.equal(one, other)


def test_autocast_around_it_changes_no_bit() -> None:
    tensors = [x.bfloat16() for x in drawn(2, 70, 4, 2, 16)]

    def within(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block_attention(q, k, v, Pattern(), 0.25)

    plain = with_gradients(lambda q, k, v: block_attention(q, k, v, Pattern(), 0.25), tensors, torch.bfloat16)
    for one, other in zip(with_gradients(within, tensors, torch.bfloat16), plain, strict=True):
        assert torch.equal(one, other)


def test_a_token_changes_nothing_that_does_not_see_it() -> None:
    pattern = Pattern(window=40, segments=documents(2, 150, {90, 230}))
    q, k, v, _ = (x.bfloat16() for x in drawn(2, 150, 4, 2, 16))
    before = block_attention(q, k, v, pattern, 0.25)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, 70], changed_v[:, :, 70] = 9.0, -9.0
    after = block_attention(q, changed_k, changed_v, pattern, 0.25)
    seeing = visible(pattern, 2, 150, 150, torch.device("cpu"))
    assert seeing is not None
    sees = seeing[:, 0, :, 70].expand(2, -1)
    assert bool((before != after).flatten(2).any(-1)[sees].all())
    assert torch.equal(before[~sees], after[~sees])


def test_the_first_key_of_a_query_is_that_of_its_document_or_its_window() -> None:
    both = first_seen(Pattern(window=3, segments=documents(2, 6, {4})), 2, 6)
    assert both is not None
    assert both.tolist() == [[0, 0, 0, 1, 4, 4], [0, 0, 0, 1, 2, 3]]
    assert first_seen(Pattern(), 2, 6) is None


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """What torch says of the processor, to be changed."""
    able = {"avx512_bf16": True, "amx_tile": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    return able


def chosen(
    pattern: Pattern | None = None,
    *,
    wanted: str = "auto",
    length: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    dropout: float = 0.0,
) -> str:
    q, k, v = (torch.empty(2, 2, length, 8, dtype=dtype) for _ in range(3))
    return choose_kernel(wanted, q, k, v, pattern or Pattern(), dropout)


def test_auto_takes_blocks_where_the_processor_has_vectors_of_bf16_and_no_tiles(processor: dict[str, bool]) -> None:
    assert chosen() == "blocks"
    processor["amx_tile"] = True
    assert chosen() == "sdpa"
    processor.update(avx512_bf16=False, amx_tile=False)
    assert chosen() == "sdpa"
    assert chosen(wanted="blocks") == "blocks"


def test_auto_takes_torchs_kernel_where_torch_does_not_tell_what_the_processor_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert chosen() == "sdpa"


def test_auto_takes_torchs_kernel_for_what_blocks_do_not_know_or_not_faster(processor: dict[str, bool]) -> None:
    assert chosen(dtype=torch.float32) == "sdpa"
    assert chosen(dropout=0.1) == "sdpa"
    assert chosen(Pattern(dense=torch.ones(1, 1, 512, 512, dtype=torch.bool))) == "sdpa"
    assert chosen(length=768) == "sdpa"
    assert chosen(Pattern(window=767), length=1024) == "blocks"
    assert chosen(Pattern(segments=documents(2, 1024, {512, 1536})), length=1024) == "blocks"
    assert chosen(Pattern(segments=documents(2, 1024, {100})), length=1024) == "sdpa"


def test_a_model_trains_on_blocks_under_autocast_and_says_so(make_model: Make, processor: dict[str, bool]) -> None:
    model = make_model("3-window", dtype=torch.float32, attention_dropout=0.0).train()
    ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))

    def gradient(kernel: str, *, narrow: bool = True) -> Tensor:
        model.configure_training(attention=kernel)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    found = gradient("auto")
    assert set(model.attention_paths()) == {"blocks"}
    exact = gradient("math", narrow=False)
    assert float((found - exact).norm()) < 1.3 * float((gradient("sdpa") - exact).norm())
