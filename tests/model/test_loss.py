"""The loss of the model: sums, gradients, masks, and labels in both conventions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.model import ArgonneForCausalLM, loss
from argonne.model.loss import LossOptions, padded, summed_loss, token_log_probs

Make = Callable[..., ArgonneForCausalLM]


def example(rows: int, vocabulary: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.3] = -100
    return hidden, weight, targets


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None, z_loss: float
) -> torch.Tensor:
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_z = torch.logsumexp(logits, -1)[targets != -100]
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") + z_loss * log_z.square().sum()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (2.0, 0.1)])
@pytest.mark.parametrize("chunk", [5, 64])
def test_products_by_onednn_give_the_same_loss_and_gradients(
    softcap: float | None, z_loss: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []
    real = loss.product

    def product(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return real(x, *others)

    monkeypatch.setattr(loss, "product", product)
    exact = example(23, 40)
    options = LossOptions(softcap, z_loss, chunk, onednn=True)
    expected = plain(*exact, softcap, z_loss)
    torch.testing.assert_close(summed_loss(*exact, options), expected, rtol=1e-12, atol=1e-12)
    assert not seen  # float64 is left to torch
    hidden, weight, targets = exact
    narrow = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    found = summed_loss(*narrow, targets, options)
    count = int((targets != -100).sum())
    assert [shape[-1] for shape in seen] == [6, 40] * -(-count // chunk)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for mine, theirs in zip(torch.autograd.grad(found, narrow), wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    exactly, wide = (token_log_probs(*given, targets, options) for given in ((hidden, weight), narrow))
    for mine, theirs in zip(wide, exactly, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(23, dtype=torch.float64)
    wanted = torch.autograd.grad(exactly[0], (hidden, weight), upstream)
    for mine, theirs in zip(torch.autograd.grad(wide[0], narrow, upstream.float()), wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 23),
    chunk=st.integers(0, 25),
    softcap=st.sampled_from([None, 2.0, 15.0]),
    z_loss=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_the_plain_ones_however_they_are_chunked(
    rows: int, chunk: int, softcap: float | None, z_loss: float, seed: int
) -> None:
    hidden, weight, targets = example(rows, 11, seed)
    expected = plain(hidden, weight, targets, softcap, z_loss)
    found = summed_loss(hidden, weight, targets, LossOptions(softcap, z_loss, chunk))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(3 * found, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [0, 5])
def test_a_padded_head_gives_the_same_losses_and_gradients(
    softcap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = example(13, 11)
    options = LossOptions(softcap, 0.1, chunk)

    def found() -> list[torch.Tensor]:
        log_p, log_z = token_log_probs(hidden, weight, targets, options)
        total = summed_loss(hidden, weight, targets, options)
        gradients = torch.autograd.grad(total + log_p.square().sum() + log_z.sum(), (hidden, weight))
        return [total, log_p, log_z, *gradients]

    expected, widths = found(), []
    monkeypatch.setattr(
        "argonne.model.loss._head_in",
        lambda dtype, weight: widths.append(len(padded(dtype, weight))) or padded(dtype, weight),
    )
    for a, b in zip(found(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert set(widths) == {64}


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 13), chunk=st.integers(0, 15), softcap=st.sampled_from([None, 2.0]), seed=st.integers(0, 99))
def test_token_log_probs_are_differentiable_one_by_one(rows: int, chunk: int, softcap: float | None, seed: int) -> None:
    hidden, weight, targets = example(rows, 11, seed)
    importance = torch.randn(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    chosen = torch.log_softmax(logits, -1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
    expected = torch.where(targets == -100, 0, chosen)
    found, _ = token_log_probs(hidden, weight, targets, LossOptions(softcap, 0.0, chunk))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    mine = torch.autograd.grad((importance * found).sum(), (hidden, weight))
    for a, b in zip(mine, torch.autograd.grad((importance * expected).sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_batch_without_targets_gives_exactly_zero_and_zero_gradients() -> None:
    hidden, weight, targets = example(9, 11)
    loss = summed_loss(hidden, weight, torch.full_like(targets, -100), LossOptions(15.0, 0.1))
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_an_all_masked_row_leaves_the_model_without_a_gradient(make_model: Make, ids: torch.Tensor) -> None:
    model = make_model("3-window").train()
    out = model(input_ids=ids, shift_labels=torch.full_like(ids, -100), loss_reduction="sum", use_cache=False)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_second_backward_over_the_same_loss_is_refused() -> None:
    hidden, weight, targets = example(5, 11)
    loss = summed_loss(hidden, weight, targets, LossOptions())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_autocast_computes_in_bf16_and_sums_in_fp32() -> None:
    hidden, weight, targets = (x.detach().float() if x.is_floating_point() else x for x in example(16, 50))
    hidden.requires_grad_(True)
    weight.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_loss(hidden, weight, targets, LossOptions(15.0))
    assert loss.dtype == torch.float32
    exact = plain(hidden.bfloat16().double(), weight.bfloat16().double(), targets, 15.0, 0.0)
    assert abs(loss.item() - exact.item()) < 0.02 * exact.item()
    gradient = torch.autograd.grad(loss, weight)[0]
    expected = torch.autograd.grad(plain(hidden, weight, targets, 15.0, 0.0), weight)[0]
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("generation", ["1", "2", "3-window"])
def test_shift_labels_are_targets_and_labels_are_inputs(
    generation: str, loss: str, make_model: Make, ids: torch.Tensor
) -> None:
    model = make_model(generation)
    model.configure_training(loss=loss, loss_chunk=0 if loss == "full" else 7)
    logits = model(input_ids=ids).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )  # logits[i] against token i + 1
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    out = model(input_ids=ids, shift_labels=targets, loss_reduction="sum", use_cache=False)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    single = expected.float()  # transformers reduces in fp32
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, single / (2 * 39), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        model(input_ids=ids, labels=ids, num_items_in_batch=10).loss, single / 10, rtol=1e-6, atol=0
    )
    mean = model(input_ids=ids, shift_labels=targets, loss_reduction="mean").loss
    torch.testing.assert_close(mean, expected / (2 * 39), rtol=1e-12, atol=0)


def test_targets_of_another_shape_are_refused(make_model: Make, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="shift_labels has shape"):
        make_model("2")(input_ids=ids, shift_labels=ids[:, 1:])


def test_token_log_probs_of_the_model_add_up_to_its_loss(make_model: Make, ids: torch.Tensor) -> None:
    model = make_model("3-window")
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    targets[0, :5] = -100
    out = model(input_ids=ids, shift_labels=targets, loss_reduction="sum", return_token_log_probs=True)
    plain_loss = model(input_ids=ids, shift_labels=targets, loss_reduction="sum").loss
    assert out.token_log_probs.shape == ids.shape
    assert not out.token_log_probs[targets == -100].any()
    torch.testing.assert_close(-out.token_log_probs.sum(), plain_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.loss, plain_loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("checkpointing", ["every_nth", "full"])
def test_activation_checkpointing_changes_no_gradient(checkpointing: str, make_model: Make, ids: torch.Tensor) -> None:
    gradients = []
    for choice in ("none", checkpointing):
        model = make_model("3-window").train()
        model.configure_training(activation_checkpointing=choice, checkpointing_stride=2)
        model(input_ids=ids, shift_labels=ids, loss_reduction="sum", use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
