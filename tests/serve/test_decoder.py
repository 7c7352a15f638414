"""Many answers at once: each is what it is alone, whoever joins and leaves; cached, chunked and shared reading equal
the plain recompute.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from argonne.errors import InputError
from argonne.serve import sampling
from argonne.serve.decoder import Answer, Decoder
from argonne.serve.engine import stream_several
from argonne.serve.lookup import Lookup
from argonne.serve.options import SamplingOptions, Shaping
from argonne.serve.quantize import in_a_row, pack
from argonne.serve.sampling import Chooser, choose_together, likeliest
from tests.serve.test_engine import choose, make_model

GENERATIONS = ["nano-1.0", "nano-2.5", "nano-3.0"]
GREEDY = SamplingOptions(max_new_tokens=24, temperature=0.0)


def model_of(generation: str, dtype: torch.dtype = torch.float32) -> Any:
    window = {"sliding_window": 8} if generation == "nano-3.0" else {}
    return make_model(generation, max_position_embeddings=256, **window).to(dtype).eval()


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(300) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def finish(decoder: Decoder) -> None:
    while decoder.busy:
        decoder.step()


def recomputed(model: Any, prompt: list[int], count: int) -> list[torch.Tensor]:
    """The logits behind each token of a greedy continuation, without a cache."""
    ids, found = list(prompt), []
    for _ in range(count):
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids.append(int(found[-1].argmax()))
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_batched_chunked_cached_decoding_is_the_plain_recompute_in_float64(generation: str, packed: bool) -> None:
    model = model_of(generation, torch.float64)
    if packed:
        pack(model)
        assert in_a_row([getattr(model.model.layers[0].self_attn, f"{name}_proj").weight for name in "qkv"]) is not None
    asked = prompts(7, 60)
    decoder = Decoder(model, rows=4, chunk=16)
    answers = [decoder.submit(prompt, GREEDY, []) for prompt in asked]
    finish(decoder)
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer.ids == [int(logits.argmax()) for logits in recomputed(model, prompt, 24)]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_in_fp32_an_answer_leaves_the_recompute_only_where_two_logits_are_as_good(generation: str) -> None:
    model = model_of(generation)
    asked = prompts(40, 60, seed=1)
    decoder = Decoder(model, rows=16, chunk=32)
    answers = [decoder.submit(prompt, GREEDY, []) for prompt in asked]
    finish(decoder)
    differ = 0
    for prompt, answer in zip(asked, answers, strict=True):
        logits = recomputed(model, prompt, 24)
        place = next((at for at, one in enumerate(logits) if int(one.argmax()) != answer.ids[at]), None)
        if place is not None:
            best = logits[place].topk(2).values
            assert float(best[0] - best[1]) <= 1e-4 * float(best[0].abs())
            differ += 1
    assert differ <= 0.01 * len(asked)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_answers_that_share_a_prompt_are_those_that_read_it_themselves(generation: str) -> None:
    model = model_of(generation)
    (prompt,) = prompts(1, 60, seed=2)
    how = SamplingOptions(max_new_tokens=12, temperature=1.0)
    together = Decoder(model, rows=4, chunk=16, deterministic=True)
    first = together.submit(prompt, how, [])
    shared = [first, *(together.submit(prompt, how.with_seed(n), [], like=first) for n in (1, 2, 3))]
    finish(together)
    for number, answer in enumerate(shared):
        alone = Decoder(model, rows=4, chunk=16, deterministic=True)
        found = alone.submit(prompt, how.with_seed(number), [])
        finish(alone)
        assert found.ids == answer.ids
    assert len({tuple(answer.ids) for answer in shared}) > 1


class Counted(torch.nn.Module):
    """A model that keeps the shape of each pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config, self.shapes = model, model.config, []

    def forward(self, **inputs: Any) -> Any:
        self.shapes.append(tuple(inputs["input_ids"].shape))
        return self.inner(**inputs)


def test_a_shared_prompt_is_read_once() -> None:
    model = Counted(model_of("nano-2.5"))
    decoder = Decoder(model, rows=4, chunk=16)
    first = decoder.submit([5] * 40, GREEDY, [])
    for _ in range(3):
        decoder.submit([5] * 40, GREEDY, [], like=first)
    finish(decoder)
    assert [shape for shape in model.shapes if shape[1] > 1] == [(1, 16), (1, 16), (1, 16)]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_an_answer_is_bit_for_bit_the_same_whoever_its_neighbours_are(generation: str) -> None:
    model = model_of(generation)
    asked = prompts(20, 70, seed=3)
    options = [
        SamplingOptions(max_new_tokens=5 + number, temperature=float(number % 2), seed=number) for number in range(20)
    ]

    def run(order: list[int], seed: int) -> dict[int, Answer]:
        decoder, draw = Decoder(model, rows=8, chunk=32, deterministic=True), random.Random(seed)
        answers: dict[int, Answer] = {}
        for number in order:
            answers[number] = decoder.submit(asked[number], options[number], [7], shaping=Shaping(logprobs=3))
            for _ in range(draw.randrange(4)):
                decoder.step()
        finish(decoder)
        return answers

    alone = {number: run([number], 0)[number] for number in range(20)}
    for seed in range(3):
        order = random.Random(seed).sample(range(20), 20)
        for number, answer in run(order, seed).items():
            assert answer.ids == alone[number].ids
            assert answer.logprobs == alone[number].logprobs  # floats, bit for bit


def test_a_step_names_each_answer_that_it_changed_once() -> None:
    decoder = Decoder(model_of("nano-2.5"), rows=4)
    answer = decoder.submit([5, 6], SamplingOptions(max_new_tokens=2, temperature=0.0), [])
    assert decoder.step() == [answer]
    assert answer.stop == "length"


def test_a_long_prompt_does_not_stall_the_others() -> None:
    decoder = Decoder(model_of("nano-2.5"), rows=4, chunk=16)
    quick = decoder.submit([5, 6], SamplingOptions(max_new_tokens=20, temperature=0.0), [])
    decoder.step()
    decoder.submit([7] * 200, GREEDY, [])
    before = len(quick.ids)
    for _ in range(5):
        decoder.step()
    assert len(quick.ids) >= before + 5


def test_prompts_are_read_in_the_order_they_came_in_whatever_their_slots() -> None:
    decoder = Decoder(model_of("nano-2.5"), rows=3, chunk=16)
    quick = SamplingOptions(max_new_tokens=1, temperature=0.0)
    first = decoder.submit([5], quick, [])
    decoder.submit([6], SamplingOptions(max_new_tokens=60, temperature=0.0), [])
    long = decoder.submit([7] * 120, GREEDY, [])
    decoder.step()
    assert first.stop == "length"
    for _ in range(9):  # each step a prompt as large as a step comes into the first slot, which is free again
        decoder.submit([8] * 16, quick, [])
        decoder.step()
    assert long.ids


def test_a_constraint_that_fails_ends_its_own_answer_alone() -> None:
    class Broken(Even):
        def allowed(self, vocabulary: int) -> torch.Tensor:
            if len(self.seen) == 2:
                raise InputError("planted")
            return super().allowed(vocabulary)

    decoder = Decoder(model_of("nano-2.5"), rows=2)
    broken = decoder.submit([5, 6], GREEDY, [], constraint=Broken())
    whole = decoder.submit([5, 6], GREEDY, [])
    finish(decoder)
    assert (broken.stop, len(broken.ids), str(broken.fault)) == ("failed", 2, "planted")
    assert (whole.stop, whole.fault) == ("length", None)
    with pytest.raises(InputError, match="planted"):
        list(stream_several(model_of("nano-2.5"), NoText(), [5, 6], [GREEDY], [], Shaping(), [Broken()]))  # type: ignore[arg-type]


class NoText:
    def decode(self, ids: list[int]) -> str:
        return "x" * len(ids)


def test_a_cancelled_answer_frees_its_slot_at_once() -> None:
    decoder = Decoder(model_of("nano-2.5"), rows=1)
    running, waiting = (decoder.submit([5, 6], GREEDY, []) for _ in range(2))
    decoder.step()
    assert (decoder.running, decoder.waiting) == (1, 1)
    decoder.end(running)
    assert (running.stop, decoder.running) == ("cancelled", 0)
    decoder.step()
    assert waiting.ids
    decoder.end(waiting)
    assert not decoder.busy
    third = decoder.submit([5, 6], GREEDY, [])
    decoder.end(third)
    assert (third.stop, decoder.busy) == ("cancelled", False)


def test_the_pass_shrinks_when_answers_leave_unless_it_is_deterministic() -> None:
    for deterministic, last in ((False, 1), (True, 8)):
        model = Counted(model_of("nano-2.5"))
        decoder = Decoder(model, rows=8, deterministic=deterministic)
        answers = [
            decoder.submit([5, number], SamplingOptions(max_new_tokens=30 if number == 7 else 3, temperature=0.0), [])
            for number in range(8)
        ]
        finish(decoder)
        assert model.shapes[-1] == (last, 1)
        (alone,) = [answer for answer in answers if len(answer.ids) == 30]
        assert alone.ids == [int(one.argmax()) for one in recomputed(model.inner, [5, 7], 30)]


def test_a_prompt_that_is_empty_or_fills_the_context_is_refused() -> None:
    decoder = Decoder(model_of("nano-2.5"), context=64)
    with pytest.raises(InputError, match="found no token"):
        decoder.submit([], GREEDY, [])
    with pytest.raises(InputError, match="found 64 tokens, expected fewer than the model's context of 64"):
        decoder.submit([1] * 64, GREEDY, [])


# ------------------------------------------------------------------------------------------------------- shaping


def chosen(logits: list[float], options: SamplingOptions, generated: list[int], **more: Any) -> int:
    return choose(Chooser(options, **more), torch.tensor(logits), generated)[0]


def test_a_repetition_penalty_counts_what_was_generated() -> None:
    strict = SamplingOptions(temperature=0.0, repetition_penalty=2.0)
    assert chosen([1.0, 3.0, 2.0], strict, []) == 1
    assert chosen([1.0, 3.0, 2.0], strict, [1]) == 2
    assert chosen([-1.0, -3.0, -1.5], strict, [0]) == 2


def test_a_logit_bias_is_added() -> None:
    greedy = SamplingOptions(temperature=0.0)
    assert chosen([1.0, 3.0, 2.0], greedy, [], shaping=Shaping(logit_bias={0: 5.0})) == 0
    assert chosen([1.0, 3.0, 2.0], greedy, [], shaping=Shaping(logit_bias={1: -100.0})) == 2


def test_min_p_drops_what_is_far_less_likely_than_the_best() -> None:
    logits = torch.tensor([0.6, 0.25, 0.1, 0.05]).log()
    chooser = Chooser(SamplingOptions(temperature=1.0, top_p=1.0, min_p=0.3))
    assert {choose(chooser, logits, [])[0] for _ in range(400)} == {0, 1}


def test_logprobs_are_the_models_own_whatever_the_sampling() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    chooser = Chooser(SamplingOptions(temperature=0.1), Shaping(logprobs=2, logit_bias={3: 50.0}))
    token, found = choose(chooser, logits, [])
    assert found is not None
    assert (token, round(found.chosen, 4)) == (3, round(float(logits[3]), 4))
    assert [place for place, _ in found.likeliest] == [0, 1]


class Even:
    """Even ids only."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def allowed(self, vocabulary: int) -> torch.Tensor:
        return torch.arange(vocabulary) % 2 == 0

    def accept(self, token: int) -> None:
        self.seen.append(token)


def test_a_constraint_masks_and_is_told_what_was_chosen() -> None:
    even = Even()
    decoder = Decoder(model_of("nano-2.5"), rows=2)
    answer = decoder.submit([5, 6], GREEDY, [], constraint=even)
    finish(decoder)
    assert even.seen == answer.ids
    assert all(token % 2 == 0 for token in answer.ids)


def test_the_likeliest_few_are_those_of_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0)).mul(4).round()  # many are equal
    for options in (
        SamplingOptions(temperature=1.0, top_p=0.9),
        SamplingOptions(temperature=1.0, top_k=40, top_p=1.0),
        SamplingOptions(temperature=0.7, top_p=0.5, min_p=0.1),
    ):
        probabilities = torch.softmax(logits / options.temperature, 0)
        values, ids = (found[0] for found in likeliest(probabilities[None], options))
        everything = probabilities.sort(descending=True, stable=True)
        if len(values) < 5000:
            # Up to the last value, of which there may be more outside, both lists are one.
            size = int((values > values[-1]).sum())
            assert ids[:size].tolist() == everything.indices[:size].tolist()
        few, whole = Chooser(options), Chooser(options)
        with monkeypatch.context() as patched:
            found = [choose(few, logits, [])[0] for _ in range(50)]
            whole_of = (everything.values[None], everything.indices[None])
            patched.setattr(sampling, "likeliest", lambda *given, kept=whole_of: kept)
            assert found == [choose(whole, logits, [])[0] for _ in range(50)]


def test_choices_made_together_are_those_made_alone_whatever_each_asks_for() -> None:
    draw = torch.Generator().manual_seed(5)
    kinds = [
        SamplingOptions(temperature=0.0),
        SamplingOptions(temperature=0.8),
        SamplingOptions(temperature=1.3, top_k=40, top_p=1.0),
        SamplingOptions(temperature=0.7, top_k=900, top_p=0.9, min_p=0.02),
        SamplingOptions(temperature=1.0, top_p=1.0),
        SamplingOptions(temperature=1.0, repetition_penalty=1.3),
    ]
    asked = [kinds[number % len(kinds)].with_seed(number) for number in range(24)]
    for vocabulary in (50, 3000):
        together, alone = ([Chooser(options) for options in asked] for _ in range(2))
        generated: list[list[int]] = [[] for _ in asked]
        for _ in range(6):
            logits = torch.randn(24, vocabulary, generator=draw) * 3
            found = choose_together(together, logits, generated)
            assert found == [
                choose_together([one], logits[row : row + 1], [generated[row]])[0] for row, one in enumerate(alone)
            ]
            for tokens, choice in zip(generated, found, strict=True):
                assert not isinstance(choice, Exception)
                tokens.append(choice[0])


def test_logits_that_are_not_finite_end_their_own_answer_alone() -> None:
    logits = torch.zeros(3, 10)
    logits[1, 4] = float("nan")
    choosers = [Chooser(SamplingOptions(seed=number)) for number in range(3)]
    first, broken, last = choose_together(choosers, logits, [[], [], []])
    assert isinstance(broken, InputError)
    assert "not finite" in str(broken)
    assert not isinstance(first, Exception)
    assert not isinstance(last, Exception)


def test_prompts_of_one_width_are_read_in_one_pass() -> None:
    model = Counted(model_of("nano-2.5"))
    decoder = Decoder(model, rows=8, chunk=64)
    answers = [decoder.submit([5] * size, GREEDY, []) for size in (9, 12, 40, 16, 3)]
    finish(decoder)
    assert [shape for shape in model.shapes if shape[1] > 1] == [(4, 16), (1, 64)]
    for answer, size in zip(answers, (9, 12, 40, 16, 3), strict=True):
        assert answer.ids == [int(one.argmax()) for one in recomputed(model.inner, [5] * size, 24)]


def test_few_answers_wait_while_many_prompts_are_read_but_not_for_long() -> None:
    model = Counted(model_of("nano-2.5"))
    decoder = Decoder(model, rows=16, chunk=16, patience=3)
    for number in range(14):
        decoder.submit([number] * 16, GREEDY, [])
    kinds = []
    while len(kinds) < 12:
        decoder.step()
        kinds = ["reads" if shape[1] > 1 else "writes" for shape in model.shapes]
    assert kinds[:10] == ["reads"] * 4 + ["writes"] + ["reads"] * 3 + ["writes", "reads"]


# ------------------------------------------------------------------------------------------------ shared beginnings


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_prompt_that_begins_as_another_did_is_the_plain_recompute_in_float64(generation: str) -> None:
    model = model_of(generation, torch.float64)
    decoder = Decoder(model, rows=3, chunk=16)
    (start,) = prompts(1, 1, seed=4)
    turns = [[*start, *range(40)]]
    for addition in ([7, 8, 9], [280, 281], []):  # a conversation: all that was said, then what is said next
        answer = decoder.submit(turns[-1], GREEDY, [])
        finish(decoder)
        assert answer.ids == [int(logits.argmax()) for logits in recomputed(model, turns[-1], 24)]
        turns.append([*turns[-1], *answer.ids, *addition])


def test_what_an_earlier_answer_has_read_is_not_read_again() -> None:
    model = Read(model_of("nano-2.5"))
    decoder = Decoder(model, rows=2, chunk=64)
    first = decoder.submit([5] * 40, GREEDY, [])
    finish(decoder)
    model.tokens.clear()
    decoder.submit([*[5] * 40, *first.ids, 9, 10], GREEDY, [])
    decoder.submit([*[5] * 30, 11], GREEDY, [])
    decoder.step()
    assert sorted(model.tokens) == [1, 3]  # the last id of an answer has never been read


class Read(Counted):
    """How many tokens each row of a pass that reads prompts holds."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.tokens: list[int] = []

    def forward(self, **inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] > 1:
            rows = (inputs["past_key_values"]._target[0][:, None] == torch.arange(64)).sum(0)
            self.tokens += [int(count) for count in rows if count]
        return super().forward(**inputs)


def test_where_bits_count_only_whole_pieces_of_a_prompt_are_shared() -> None:
    model = model_of("nano-3.0")
    long = [number % 290 for number in range(101)]
    alone = Decoder(model, rows=4, chunk=32, deterministic=True)
    expected = alone.submit([*long, 5], GREEDY, [], shaping=Shaping(logprobs=2))
    finish(alone)
    decoder = Decoder(model, rows=4, chunk=32, deterministic=True)
    for prompt in (long, [*long[:50], 9], [1, 2, 3]):
        decoder.submit(prompt, GREEDY, [])
    finish(decoder)
    found = decoder.submit([*long, 5], GREEDY, [], shaping=Shaping(logprobs=2))
    decoder.step()
    assert found.read >= 96
    finish(decoder)
    assert found.ids == expected.ids
    assert found.logprobs == expected.logprobs  # floats, bit for bit


# -------------------------------------------------------------------------------------------------------- guessing


@pytest.mark.parametrize("generation", GENERATIONS)
def test_whatever_is_guessed_an_answer_is_the_plain_recompute_in_float64(
    generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, draw, steps = model_of(generation, torch.float64), random.Random(0), 0
    for prompt in [[3, 4, 5, 6, 7] * 6, *prompts(3, 60, seed=6)]:
        expected = [int(logits.argmax()) for logits in recomputed(model, prompt, 50)]

        def guess(self: Lookup, most: int, prompt: list[int] = prompt, expected: list[int] = expected) -> list[int]:
            """Some right tokens, then a wrong one."""
            left = expected[len(self) - len(prompt) :]
            right = draw.randrange(5)
            return [*left[:right], *((token + 1) % 290 for token in left[right : right + 1])][:most]

        for patched in (True, False):
            with monkeypatch.context() as patch:
                if patched:
                    patch.setattr(Lookup, "guess", guess)
                decoder = Decoder(model, rows=1)
                answer = decoder.submit(prompt, SamplingOptions(max_new_tokens=50, temperature=0.0), [])
                while decoder.busy:
                    decoder.step()
                    steps += patched
                assert answer.ids == expected
    assert steps < 4 * 30


def test_a_text_that_repeats_itself_is_guessed() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert lookup.guess(8) == [4, 5, 6, 1]
    lookup.was_right(4, 4)
    lookup.add([4, 5, 6, 1])
    assert lookup.guess(8) == [2, 3, 4, 5, 6, 1]
    assert lookup.guess(2) == [2, 3]
    lookup.was_right(6, 0)
    assert lookup.guess(8) == []
    assert Lookup([1, 2, 3]).guess(8) == []


def test_nothing_is_guessed_where_bits_count_or_the_choice_is_not_the_likeliest() -> None:
    for options, deterministic in ((GREEDY, True), (SamplingOptions(max_new_tokens=24, temperature=0.01), False)):
        decoder = Decoder(model_of("nano-2.5"), rows=1, deterministic=deterministic)
        answer = decoder.submit([3, 4, 5] * 8, options, [])
        while decoder.busy:
            before = len(answer.ids)
            decoder.step()
            assert len(answer.ids) <= before + 2  # a step that reads the prompt gives two


def test_a_guess_ends_with_the_answer() -> None:
    model = model_of("nano-2.5")
    whole = [int(logits.argmax()) for logits in recomputed(model, [3, 4, 5] * 8, 24)]
    for stop in range(1, 24):
        decoder = Decoder(model, rows=1)
        limited = decoder.submit([3, 4, 5] * 8, SamplingOptions(max_new_tokens=stop, temperature=0.0), [])
        ended = decoder.submit([3, 4, 5] * 8, GREEDY, [whole[stop]])
        finish(decoder)
        assert limited.ids == whole[:stop]
        assert ended.ids == whole[: whole.index(whole[stop])]


def test_a_form_that_allows_nothing_and_a_temperature_next_to_zero_harm_no_neighbour() -> None:
    class Nothing(Even):
        def allowed(self, vocabulary: int) -> torch.Tensor:
            return torch.zeros(vocabulary, dtype=torch.bool)

    options = SamplingOptions(temperature=1.0)
    choosers = [
        Chooser(options),
        Chooser(options, None, Nothing()),
        Chooser(SamplingOptions(temperature=1e-300)),
        Chooser(SamplingOptions(temperature=1e-12, top_k=3)),
    ]
    logits = torch.arange(40.0).view(4, 10)
    first, nothing, cold, cool = choose_together(choosers, logits, [[], [], [], []])
    assert first == choose_together([Chooser(options)], logits[:1], [[]])[0]
    assert isinstance(nothing, InputError)
    assert "allows no token" in str(nothing)
    assert cold == cool == (9, None)
