"""Passes over slots: that of one token in each row, of rounded models, against that of any number of tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from argonne.serve.decoder import Decoder
from argonne.serve.forward import Forward
from argonne.serve.options import SamplingOptions, Shaping
from argonne.serve.quantize import pack, quantize
from tests.serve.test_engine import make_model

PROMPTS = [list(range(3, 30)), [7, 8, 9], list(range(100, 140))]
GENERATIONS = ("nano-1.0", "nano-2.5", "nano-3.0")


def rounded_model(generation: str) -> Any:
    window = {"sliding_window": 8} if generation == "nano-3.0" else {}
    model = make_model(generation, **window)
    quantize(model)
    pack(model)
    return model


def logits_of(model: Any, ids: list[list[int]], alone: bool) -> Tensor:
    """(steps, rows, vocabulary) behind the given tokens, which follow the prompts of the rows one by one. alone: as the
    pass of one token does it.
    """
    decoder, found = Decoder(model, rows=len(PROMPTS)), []
    assert decoder._pass is not None
    decoder._pass.alone = alone and decoder._pass.alone
    run = decoder._forward

    def forced(fed: Tensor, slots: Any, places: Tensor, last: int = 1) -> Tensor:
        if fed.shape[1] == 1:
            fed = torch.tensor([[row[len(found)]] for row in ids])
            found.append(run(fed, slots, places, last))
            return found[-1]
        return run(fed, slots, places, last)

    decoder._forward = forced  # type: ignore[method-assign]
    options = SamplingOptions(max_new_tokens=1 + len(ids[0]), temperature=0.0, seed=0)
    for prompt in PROMPTS:
        decoder.submit(prompt, options, [], shaping=Shaping(logit_bias={5: 0.0}))  # of which nothing is guessed
    while decoder.busy:
        decoder.step()
    return torch.stack(found)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_single_token_in_each_row_is_what_the_pass_of_many_makes_of_it(generation: str) -> None:
    ids = [[11, 12, 13, 14, 15, 16], [20, 21, 22, 23, 24, 25], [40, 50, 60, 70, 80, 90]]
    found, expected = (logits_of(rounded_model(generation), ids, alone) for alone in (True, False))
    assert found.shape == expected.shape
    assert not torch.equal(found, expected)  # another order of sums
    assert bool(((found - expected).abs() <= 0.01 * expected.abs().amax(-1, keepdim=True)).all())


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic"])
def test_a_position_is_rotated_as_the_model_does_it(kind: str) -> None:
    """Each looked up that has been computed before, but where the longest row decides."""
    scaled = {} if kind == "default" else {"rope_scaling": {"rope_type": kind, "factor": 2.0}}
    model = make_model("nano-3.0", **scaled)
    forward = Forward(model)
    for places in ([[0, 1, 2]], [[5], [63]], [[30], [2]], [[90], [3]], [[7]]):
        positions = torch.tensor(places)
        found = forward._cos_and_sin(positions, int(positions.max()) + 1, torch.float32)
        for table, expected in zip(found, model.model.rotary_emb(positions, torch.float32), strict=True):
            assert torch.equal(table, expected)


def test_it_is_taken_where_layers_are_rounded() -> None:
    assert Forward(rounded_model("nano-3.0")).alone
    assert not Forward(make_model("nano-3.0")).alone


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_model_in_bf16_is_in_fp32_around_its_rounded_products(generation: str) -> None:
    model = make_model(generation).to(torch.bfloat16)
    quantize(model)
    pack(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert Forward(model).alone
    with torch.no_grad():
        assert model(input_ids=torch.arange(9)[None], use_cache=False).logits.dtype == torch.float32


@pytest.mark.parametrize("generation", GENERATIONS)
def test_an_answer_of_a_rounded_model_is_the_same_beside_any_others(generation: str) -> None:
    model, shaping = rounded_model(generation), Shaping(logprobs=1)

    def answered(prompts: list[list[int]]) -> tuple[list[int], list[Any]]:
        decoder = Decoder(model, rows=4)
        options = SamplingOptions(max_new_tokens=12, temperature=0.0)
        answers = [decoder.submit(prompt, options, [], shaping=shaping) for prompt in prompts]
        while decoder.busy:
            decoder.step()
        return answers[0].ids, answers[0].logprobs

    alone = answered(PROMPTS[:1])
    assert answered(PROMPTS) == alone
    assert answered([PROMPTS[0], *PROMPTS[1:], PROMPTS[2][::-1]]) == alone


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("rounded", [True, False])
def test_the_same_request_gives_one_answer_whenever_others_come_and_go(rows: int, rounded: bool) -> None:
    """Of a model whose rows are as long as a small model's really are."""
    model = make_model("nano-3.0", hidden_size=128, head_dim=32, intermediate_size=384, vocab_size=2048)
    if rounded:
        quantize(model)
    pack(model)
    found: dict[int, set[tuple[int, ...]]] = {}
    for seed in range(4):
        draw, decoder, asked = random.Random(seed), Decoder(model, rows=rows, deterministic=True), []
        waiting = [draw.randrange(len(PROMPTS)) for _ in range(9)]
        while waiting or decoder.busy:
            while waiting and draw.random() < 0.4:
                which = waiting.pop()
                options = SamplingOptions(max_new_tokens=6, temperature=0.0)
                asked.append((which, decoder.submit(PROMPTS[which], options, [])))
            decoder.step()
        for which, answer in asked:
            found.setdefault(which, set()).add(tuple(answer.ids))
    assert {which: len(answers) for which, answers in found.items()} == dict.fromkeys(range(len(PROMPTS)), 1)
