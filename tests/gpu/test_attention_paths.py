"""Every attention path of a CUDA machine against the plain formula in float64; which kernels ran; what memory they
took.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from argonne.model.attention import Pattern, segments_of
from argonne.model.build import build_model, config_from_fields
from argonne.model.fused import Segments
from argonne.model.kernels import ORDER, math_attention, run_kernel, why_not
from argonne.presets import presets

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTH = 300
PLANS = ["causal", "window", "documents", "documents-window"]
# One launch of any of these is attention in one piece; the plain path multiplies whole score matrices instead.
FUSED = ("flash", "fmha", "cudnn", "efficient_attention", "flex", "triton_tem")


@pytest.fixture(autouse=True)
def _compiler_without_a_past() -> None:
    torch._dynamo.reset()  # which compiles a function for a few shapes only


def plan_of(name: str, rows: int) -> Pattern:
    segments = None
    if "documents" in name:
        row = torch.cat([torch.arange(130), torch.arange(7), torch.arange(LENGTH - 137)])
        segments = segments_of(row.expand(rows, -1), None, (rows, LENGTH), torch.device("cuda"))
    assert segments is None or isinstance(segments, Segments)
    return Pattern(64 if "window" in name else None, segments)


def tensors(dtype: torch.dtype, heads: int, shared: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = (heads, shared, shared)
    return [
        torch.randn(2, n, LENGTH, width, generator=generator, device="cuda", dtype=torch.float64)
        .to(dtype)
        .requires_grad_(True)
        for n in sizes
    ]


@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 4, 81), (4, 4, 108), (4, 2, 128), (6, 2, 170), (6, 2, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kernel", ORDER)
def test_a_path_equals_the_plain_formula_forward_and_backward(
    kernel: str, plan: str, dtype: torch.dtype, heads: int, shared: int, width: int
) -> None:
    q, k, v = tensors(dtype, heads, shared, width)
    wanted = plan_of(plan, 2)
    if reason := why_not(kernel, q, k, v, wanted, 0.0):
        pytest.skip(reason)
    wide = [x.detach().double().requires_grad_(True) for x in (q, k, v)]
    exact = math_attention(*wide, wanted, width**-0.5, 0.0)
    upstream = torch.randn(
        exact.shape, device="cuda", dtype=torch.float64, generator=torch.Generator("cuda").manual_seed(1)
    )
    expected = [exact, *torch.autograd.grad(exact, wide, upstream)]
    output, path = run_kernel(kernel, q, k, v, wanted, width**-0.5, 0.0)
    found = [output, *torch.autograd.grad(output, (q, k, v), upstream.to(dtype))]
    assert path.startswith(kernel)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def kernels_of(model: Any, ids: torch.Tensor, **inputs: Any) -> list[str]:
    """Names of the CUDA kernels that one training step under bf16 autocast launches."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.autocast("cuda", torch.bfloat16):
        model(input_ids=ids, shift_labels=ids, loss_reduction="sum", use_cache=False, **inputs).loss.backward()
    with torch.profiler.profile(activities=activities) as profile, torch.autocast("cuda", torch.bfloat16):
        model(input_ids=ids, shift_labels=ids, loss_reduction="sum", use_cache=False, **inputs).loss.backward()
    return [event.name.lower() for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("generation", ["nano-1.0", "nano-2.5", "nano-3.0"])
@pytest.mark.parametrize("packed", [False, True])
def test_bf16_autocast_runs_a_fused_kernel_in_every_layer(generation: str, packed: bool) -> None:
    fields = {**presets()[generation].fields, "attention_dropout": 0.0, "hidden_dropout": 0.0}
    model = build_model(config_from_fields(fields), seed=0, device="cuda").train()
    ids = torch.randint(0, 2048, (2, 256), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    inputs: dict[str, Any] = {}
    if packed:
        inputs["position_ids"] = torch.cat([torch.arange(100), torch.arange(156)]).expand(2, -1).cuda()
    ran = kernels_of(model, ids, **inputs)
    layers = model.config.num_hidden_layers
    fused = [name for name in ran if any(word in name for word in FUSED)]
    assert len(fused) >= 2 * layers, ran  # forward and backward
    # softmax_warp<.., true, ..> is the logarithm's, of the loss.
    plain = [name for name in ran if "softmax" in name and "log" not in name and ", true, " not in name]
    outside = [name for name in plain if name not in fused]
    assert not outside, "a softmax outside a fused kernel: the plain path ran"
    expected = {
        "full_attention": "documents" if packed else "causal",
        "sliding_attention": "documents-window" if packed else "window",
    }
    for path, kind in zip(model.attention_paths(), model.config.layer_types or [], strict=True):
        assert path.split("-", 1)[1].replace("window-blocks", "window") == expected[kind]
        assert path.split("-", 1)[0] != "math"


def peak_gib(kernel: str) -> float:
    """Peak memory of a forward and backward pass of 1.5's attention shape: 16 heads of 81, 2,048
    tokens, 8 rows, bf16.
    """
    q, k, v = (torch.randn(8, 16, 2048, 81, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run_kernel(kernel, q, k, v, Pattern(), 81**-0.5, 0.0)[0].sum().backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def test_fused_attention_takes_a_fraction_of_the_plain_memory(record_property: Any) -> None:
    plain, fused = peak_gib("math"), peak_gib("sdpa")
    record_property("peak_gib", {"math": plain, "sdpa": fused})
    print(
        f"attention of 1.5: math {plain:.2f} GiB, fused {fused:.2f} GiB, ratio {plain / fused:.1f}; the whole model's "
        "published ratio is 2.6"
    )
    assert plain > 2.6 * fused


@pytest.mark.parametrize("generation", ["nano-2.5", "nano-3.0"])
def test_a_window_or_document_mask_is_never_a_dense_tensor(generation: str) -> None:
    """32 Ki tokens: one dense bool mask alone would be 1 GiB."""
    fields = {**presets()[generation].fields, "max_position_embeddings": 32768}
    model = build_model(config_from_fields(fields), seed=0, device="cuda", dtype=torch.bfloat16)
    model.configure_training(loss_chunk=4096)
    ids = torch.randint(0, 2048, (1, 32768), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    positions = (torch.arange(32768, device="cuda") % 10_000)[None]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        model(input_ids=ids, position_ids=positions, shift_labels=ids, loss_reduction="sum", use_cache=False)
    assert torch.cuda.max_memory_allocated() - before < 2**30


def test_positions_may_stay_on_the_cpu() -> None:
    model = build_model(
        config_from_fields(presets()["nano-3.0"].fields), seed=0, device="cuda", dtype=torch.bfloat16
    ).eval()
    ids = torch.randint(0, 2048, (2, 256), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    positions = torch.cat([torch.arange(100), torch.arange(156)]).expand(2, -1)
    with torch.no_grad():
        there, here = (
            model(input_ids=ids, position_ids=x, use_cache=False).logits for x in (positions.cuda(), positions)
        )
    assert torch.equal(there, here)
