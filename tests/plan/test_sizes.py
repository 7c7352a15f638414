"""The size that `argonne train` takes: what holds for every text, time and machine."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.errors import InputError
from argonne.plan import Device, device, make_plan, shape_of
from argonne.plan.devices import GIB, best_choice, usable_memory
from argonne.plan.sizes import (
    FEW,
    LADDER,
    LEAST_STEPS,
    LEAST_TOKENS,
    MANY,
    PER_PARAMETER,
    VOCABULARIES,
    Choice,
    choose_size,
    vocabulary_for,
)

TEXTS = st.integers(LEAST_TOKENS, 10**11)
HOURS = st.floats(0.001, 1000)
RATES = st.floats(1e9, 1e15)
MEMORIES = st.floats(2, 200)
ENTRIES = st.sampled_from([512, *VOCABULARIES, 151_669])


def machine(rate: float, gib: float = 64) -> Device:
    return replace(device("cpu"), sustained=rate, memory=gib * GIB)


def chosen(text: int, hours: float, rate: float, gib: float = 64, entries: int = 2048) -> Choice:
    return choose_size(text, entries, hours, machine(rate, gib))


@settings(deadline=None, max_examples=60)
@given(TEXTS, HOURS, RATES, MEMORIES, ENTRIES)
def test_there_is_always_a_size_and_it_keeps_to_memory_time_and_passes(
    text: int, hours: float, rate: float, gib: float, entries: int
) -> None:
    found, place = chosen(text, hours, rate, gib, entries), machine(rate, gib)
    recipe, steps = found.recipe, found.recipe.train.steps
    assert steps is not None
    assert found.tokens == steps * recipe.batch.tokens_per_step
    way = best_choice(recipe, shape_of(recipe.model, recipe.data.sequence_length), place, 1)
    assert way.memory.total <= usable_memory(place, 1)
    assert steps >= LEAST_STEPS
    assert found.tokens <= found.rate * hours * 3600 or steps == LEAST_STEPS
    assert found.passes <= MANY
    assert found.passes <= FEW or found.tokens <= PER_PARAMETER * found.parameters
    assert recipe.batch.tokens_per_step % recipe.data.sequence_length == 0


@settings(deadline=None, max_examples=60)
@given(st.integers(LEAST_TOKENS, 2 * 10**6), HOURS, RATES)
def test_the_less_text_there_is_for_a_parameter_the_less_often_it_is_read(text: int, hours: float, rate: float) -> None:
    found = chosen(text, hours, rate)
    assert found.passes <= max(FEW, MANY * text / found.parameters) * 1.01


@settings(deadline=None, max_examples=60)
@given(TEXTS, HOURS, RATES, st.floats(1, 100))
def test_more_time_more_text_more_speed_and_more_memory_never_make_it_smaller(
    text: int, hours: float, rate: float, more: float
) -> None:
    least = chosen(text, hours, rate, 2).parameters
    assert chosen(text, hours * more, rate, 2).parameters >= least
    assert chosen(int(text * more), hours, rate, 2).parameters >= least
    assert chosen(text, hours, rate * more, 2).parameters >= least
    assert chosen(text, hours, rate, 2 * more).parameters >= least


@settings(deadline=None, max_examples=60)
@given(TEXTS, HOURS, RATES)
def test_above_the_smallest_the_text_feeds_it_within_the_time(text: int, hours: float, rate: float) -> None:
    found = chosen(text, hours, rate)
    if found.recipe.model.hidden_size != LADDER[0].hidden_size:
        assert found.tokens >= 0.98 * PER_PARAMETER * found.parameters
        assert found.passes <= FEW * 1.02
        assert found.tokens / found.rate <= 3600 * hours


@given(TEXTS, HOURS, RATES)
@settings(deadline=None, max_examples=20)
def test_the_same_text_machine_and_time_give_the_same_choice(text: int, hours: float, rate: float) -> None:
    assert chosen(text, hours, rate) == chosen(text, hours, rate)


@pytest.mark.parametrize(
    ("text", "hours", "rate", "wants"),
    [
        (10**10, 0.5, 50e9, r"would want [\d,.]+ hours$"),
        (10**6, 100.0, 50e12, r"would want [\d,.]+M tokens of text$"),
        (10**6, 0.1, 50e9, r"would want [\d,.]+ hours and [\d,.]+M tokens of text$"),
    ],
)
def test_it_says_what_the_next_size_would_want(text: int, hours: float, rate: float, wants: str) -> None:
    larger = chosen(text, hours, rate).larger
    assert larger is not None
    assert re.search(wants, larger), larger


def test_the_next_size_may_want_memory() -> None:
    found = choose_size(10**11, 2048, 1e6, machine(1e15, 2))
    assert found.larger is not None
    assert "memory of cpu" in found.larger


def test_the_ladder_goes_from_a_million_to_a_few_hundred_million_and_each_can_be_trained() -> None:
    found = [choose_size(10**12, 16384, 10**6, machine(1e16, 4000))]
    assert found[0].larger is None
    assert 300e6 < found[0].parameters < 400e6
    sizes = [shape_of({**size._asdict(), "vocab_size": 2048}, 8).parameters() for size in LADDER]
    assert 0.9e6 < sizes[0] < 1.2e6
    assert all(1.3 < after / before < 3.2 for before, after in itertools.pairwise(sizes))


def test_a_gpu_is_asked_as_a_plan_asks_it() -> None:
    found = choose_size(10**10, 16384, 1.0, device("h100"))
    assert found.parameters > 30e6
    plan = make_plan(found.recipe, gpu="h100")
    assert plan.hours is not None
    assert plan.hours <= 1.0
    assert plan.fits


@pytest.mark.parametrize("hours", [0.0, -1.0, math.inf, math.nan])
def test_no_time_is_refused(hours: float) -> None:
    with pytest.raises(InputError, match=r"--hours: found .*, expected more than 0"):
        chosen(10**6, hours, 50e9)


def test_too_little_text_is_refused_with_what_is_needed() -> None:
    with pytest.raises(InputError, match=r"about 9,999 tokens .* at least 10,000, some 35 kB of text"):
        chosen(LEAST_TOKENS - 1, 1.0, 50e9)


def test_a_machine_without_memory_is_refused() -> None:
    with pytest.raises(InputError, match="even the smallest model does not fit into the memory of cpu"):
        chosen(10**6, 1.0, 50e9, 0.1)


@settings(deadline=None, max_examples=60)
@given(st.floats(1e4, 1e13), HOURS, RATES, st.floats(1, 1000))
def test_a_tokenizer_grows_with_text_and_time(text: float, hours: float, rate: float, more: float) -> None:
    found = vocabulary_for(text, hours, machine(rate))
    assert found in VOCABULARIES
    assert vocabulary_for(text * more, hours, machine(rate)) >= found
    assert vocabulary_for(text, hours * more, machine(rate)) >= found


def test_little_text_has_the_smallest_tokenizer_and_much_with_much_time_the_largest() -> None:
    assert vocabulary_for(1e6, 1000.0, device("h100")) == VOCABULARIES[0]
    assert vocabulary_for(1e12, 1.0, machine(50e9)) == VOCABULARIES[0]
    assert vocabulary_for(1e12, 100.0, device("h100")) == VOCABULARIES[-1]
