"""The CUDA kernels' adapters against kernels written from their documentation; the order; what is said when one cannot
run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from argonne.errors import InputError
from argonne.model import ArgonneForCausalLM
from argonne.model.attention import Pattern, segments_of
from argonne.model.build import check_attention
from argonne.model.fused import (
    Segments,
    block_mask,
    call_flash,
    call_varlen,
    flash_library,
    flex_attention,
    mask_function,
    varlen_function,
    why_not_varlen,
)
from argonne.model.kernels import ORDER, choose_kernel, math_attention, run_kernel, sdpa_for_cuda
from tests.model.test_attention import positions_of, tensors

Make = Callable[..., ArgonneForCausalLM]
PLANS: dict[str, tuple[int | None, list[list[int]] | None]] = {
    "causal": (None, None),
    "window": (9, None),
    "documents": (None, [[13, 1, 26], [5]]),
    "documents and window": (9, [[13, 1, 26], [5]]),
}


def plan_of(name: str) -> Pattern:
    window, documents = PLANS[name]
    segments = None
    if documents is not None:
        segments = segments_of(
            torch.stack([positions_of(row, 40) for row in documents]), None, (2, 40), torch.device("cpu")
        )
    assert segments is None or isinstance(segments, Segments)
    return Pattern(window, segments)


def documented_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, left: int, right: int
) -> torch.Tensor:
    """(T, Hq, D), (T, Hkv, D): query i sees keys i - left .. i + right, -1 = without limit."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    i, j = torch.arange(len(q))[:, None], torch.arange(len(k))[None]
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    if left >= 0:
        hidden |= j < i - left
    if right >= 0:
        hidden |= j > i + right
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", torch.softmax(scores.masked_fill(hidden, -torch.inf), -1), v)


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: Any = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
) -> Any:
    assert q.shape[-1] % 8 == 0
    assert causal
    return torch.stack(
        [documented_attention(*row, softmax_scale, window_size[0], 0) for row in zip(q, k, v, strict=True)]
    )


def flash_attn_varlen_func(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int, **settings: Any
) -> Any:
    assert cu_seqlens_q.dtype == torch.int32
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) <= max_seqlen_q
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([flash_attn_func(*(x[None] for x in part), **settings)[0] for part in parts]), "lse"


def varlen_attn(
    q: Any,
    k: Any,
    v: Any,
    cu_q: Any,
    cu_k: Any,
    max_q: int,
    max_k: int,
    *,
    scale: Any,
    window_size: Any,
    enable_gqa: bool = False,
) -> Any:
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert q.shape[-1] % 8 == 0
    assert window_size[1] == 0
    lengths = cu_q.diff().tolist()
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([documented_attention(*part, scale, window_size[0], 0) for part in parts])


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kernel", ["flash", "varlen"])
def test_an_adapter_asks_its_kernel_for_exactly_the_plan(kernel: str, plan: str, shared: int) -> None:
    q, k, v = tensors(2, 40, heads=4, shared=shared, width=10)
    wanted = plan_of(plan)
    expected = math_attention(q, k, v, wanted, 0.3, 0.0)
    if kernel == "flash":
        found = call_flash(flash_attn_func, flash_attn_varlen_func, q, k, v, wanted, 0.3, 0.0)
    else:
        found = call_varlen(varlen_attn, q, k, v, wanted, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.autograd.grad(expected, (q, k, v), upstream)
    for a, b in zip(torch.autograd.grad(found, (q, k, v), upstream), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("plan", PLANS)
def test_flex_attention_computes_the_plan(plan: str) -> None:
    q, k, v = (x.detach().float() for x in tensors(2, 40, heads=4, shared=2, width=10))
    wanted = plan_of(plan)
    expected = math_attention(q.double(), k.double(), v.double(), wanted, 0.3, 0.0)
    torch.testing.assert_close(flex_attention(q, k, v, wanted, 0.3).double(), expected, rtol=0, atol=1e-6)
    mask = wanted.memo[q.device]
    flex_attention(q, k, v, wanted, 0.3)
    assert wanted.memo[q.device] is mask  # made once, read in every layer


@pytest.mark.parametrize("plan", PLANS)
def test_auto_takes_sdpa_on_the_cpu_in_training_and_in_inference(plan: str) -> None:
    q, k, v = tensors(2, 40)
    assert choose_kernel("auto", q, k, v, plan_of(plan), 0.0) == "sdpa"
    with torch.no_grad():
        assert choose_kernel("auto", q, k, v, plan_of(plan), 0.0) == "sdpa"
    _, path = run_kernel("sdpa", q, k, v, plan_of(plan), 0.3, 0.0)
    names = {"causal": "sdpa-causal", "window": "sdpa-window-blocks", "documents": "sdpa-documents"}
    assert path == names.get(plan, "sdpa-documents-window")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("flash", "FlashAttention needs a CUDA device, this is cpu"),
        ("varlen", "varlen attention needs a CUDA device, this is cpu"),
        ("flex", "flex attention has no gradients on the CPU"),
        ("blocks", "blocks are for bf16 on a CPU, this is torch.float"),
        ("fast", "is not known; expected auto or one of flash, varlen, flex, blocks, sdpa, math"),
    ],
)
def test_a_forced_kernel_that_cannot_run_is_an_error_with_its_reason(
    kernel: str, reason: str, make_model: Make
) -> None:
    model = make_model("3-window").train()
    with pytest.raises(InputError, match=f"train.attention: .*{reason}"):
        check_attention(model.config, model.device, kernel, torch.float32, documents=True)
    if kernel in ORDER:
        model.configure_training(attention=kernel)
        with pytest.raises(ValueError, match=reason):
            model(input_ids=torch.zeros(1, 12, dtype=torch.int64), use_cache=False)
    check_attention(model.config, model.device, "sdpa", torch.float32, documents=True)


def test_running_out_of_memory_is_no_reason_to_take_another_kernel(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", full)
    with pytest.raises(torch.OutOfMemoryError):
        make_model("2")(input_ids=torch.zeros(1, 12, dtype=torch.int64), use_cache=False)


def test_one_query_over_cached_keys_repeats_none_of_them() -> None:
    q, k, v = tensors(3, 17, heads=6, shared=2)
    q = q[:, :, -1:]
    mask = torch.rand(3, 1, 1, 17, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[..., -1] = True
    for dense in (None, mask):
        plan = Pattern(dense=dense)
        found, path = run_kernel("sdpa", q, k, v, plan, 0.3, 0.0)
        assert path == "sdpa-decode"
        torch.testing.assert_close(found, math_attention(q, k, v, plan, 0.3, 0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", ["none", "band", "batched", "by head"])
@pytest.mark.parametrize("shared", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_cuda_is_called_with_means_the_same(mask: str, shared: int, dtype: torch.dtype) -> None:
    """The rewriting for CUDA's kernels (padded heads, folded groups) run on the CPU."""
    q, k, v = (x.detach().to(dtype) for x in tensors(2, 12, heads=6, shared=shared, width=9))
    generator = torch.Generator().manual_seed(0)
    shapes = {"none": None, "band": (12, 12), "batched": (2, 1, 12, 12), "by head": (2, 6, 12, 12)}
    shape = shapes[mask]
    dense = None if shape is None else (torch.rand(shape, generator=generator) < 0.6) | torch.eye(12, dtype=torch.bool)
    settings = {"scale": 0.3, "is_causal": dense is None}
    found = sdpa_for_cuda(q, k, v, dense, settings)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, dense, enable_gqa=True, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-2)


def test_varlen_names_what_this_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        """A query as far as the question goes."""

        device, dtype, shape = torch.device("cuda"), torch.bfloat16, (1, 4, 8, 64)

    class FewerHeads(OnCuda):
        shape = (1, 2, 8, 64)

    query, key = OnCuda(), FewerHeads()
    monkeypatch.setattr("argonne.model.fused.varlen_function", lambda: None)
    assert "no varlen attention with windows" in str(why_not_varlen(query, key, Pattern(), 0.0))  # type: ignore[arg-type]
    monkeypatch.setattr("argonne.model.fused.varlen_function", lambda: (varlen_attn, ("window_size", "scale")))
    assert "no grouped queries" in str(why_not_varlen(query, key, Pattern(), 0.0))  # type: ignore[arg-type]
    names = ("window_size", "scale", "enable_gqa")
    monkeypatch.setattr("argonne.model.fused.varlen_function", lambda: (varlen_attn, names))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not_varlen(query, key, Pattern(), 0.0) is None  # type: ignore[arg-type]
    assert "no dropout" in str(why_not_varlen(query, key, Pattern(), 0.1))  # type: ignore[arg-type]
    OnCuda.dtype = torch.float32
    assert "fp16 or bf16" in str(why_not_varlen(query, key, Pattern(), 0.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [40, 128, 500])
@pytest.mark.parametrize("window", [None, 9, 200])
@pytest.mark.parametrize("documents", [None, [[130, 1, 369], [500]], [[1] * 500, [128, 128, 244]]])
def test_the_blocks_of_flex_attention_are_those_that_torch_finds_in_the_whole_mask(
    length: int, window: int | None, documents: list[list[int]] | None
) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    device, segments = torch.device("cpu"), None
    if documents is not None:
        positions = torch.stack([positions_of(row, 500) for row in documents])[:, :length]
        segments = segments_of(positions, None, (2, length), device)
        assert not isinstance(segments, str)
    pattern = Pattern(window, segments)
    found = block_mask(pattern, 2, length, device)
    mask = mask_function(pattern, 2, length, device)
    expected = create_block_mask(mask, 2 if segments else None, None, length, length, device="cpu")
    assert torch.equal(found.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_looking_for_a_kernel_is_no_break_in_compiled_code() -> None:
    def choose(x: torch.Tensor) -> torch.Tensor:
        flash, varlen = flash_library((9, 0)), varlen_function()
        return x + (flash is not None) + (varlen is not None and "scale" in varlen[1])

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), choose(torch.ones(2)))
