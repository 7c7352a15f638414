"""Resume, and changes of row length, batch, weights, sources and order between two sessions: nothing is repeated or
skipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.config import BatchChange, BatchSection
from argonne.data.dataset import open_training_data
from argonne.errors import InputError
from tests.data.rows import SLOW, global_rows, resumed, section, starts


@SLOW
@given(stop=st.integers(0, 12), again=st.integers(0, 12), order=st.sampled_from(["sequential", "shuffled"]))
def test_resume_at_any_step_reads_what_an_uninterrupted_run_reads(
    write_tokens: Callable[..., Path], stop: int, again: int, order: str
) -> None:
    first, second = write_tokens("a", [90, 33]), write_tokens("b", [70], offset=1000)
    chosen = section(first, second, weights=(0.7, 0.3), order=order)
    batch = BatchSection(
        tokens_per_step=40, steps=(BatchChange(step=4, tokens_per_step=48), BatchChange(step=9, sequence_length=4))
    )
    whole = open_training_data(chosen, batch, 3)
    expected = global_rows(whole, range(14))
    part = resumed(chosen, batch, whole, stop)
    part = resumed(chosen, batch, part, max(stop, again))
    assert part.mixture.phases == whole.mixture.phases
    for step, rows in zip(range(max(stop, again), 14), global_rows(part, range(max(stop, again), 14)), strict=True):
        assert np.array_equal(rows, expected[step])
    assert part.state(13) == whole.state(13)


@SLOW
@given(
    first=st.integers(1, 9),
    second=st.integers(1, 9),
    stop=st.integers(1, 5),
    order=st.sampled_from(["sequential", "shuffled"]),
    tokens=st.sampled_from([150, 151, 277, 400]),
)
def test_another_row_length_neither_repeats_nor_skips_within_the_epoch(
    write_tokens: Callable[..., Path], first: int, second: int, stop: int, order: str, tokens: int
) -> None:
    folder = write_tokens(f"a{tokens}", [tokens])
    data = open_training_data(section(folder, length=first, order=order), BatchSection(tokens_per_step=2 * first), 3)
    read = [rows[:, :first] for rows in global_rows(data, range(stop))]
    after = resumed(section(folder, length=second, order=order), BatchSection(tokens_per_step=3 * second), data, stop)
    assert [phase.first_step for phase in after.mixture.phases] == ([0, stop] if (first, 2) != (second, 3) else [0])
    whole = tokens - 1 if order == "sequential" else (tokens - 1) // first * first
    steps = (whole - 2 * first * stop) // (3 * second)
    read += [rows[:, :second] for rows in global_rows(after, range(stop, stop + steps))]
    seen = np.concatenate([rows.ravel() for rows in read])
    assert len(np.unique(seen)) == len(seen)
    assert len(seen) == 2 * first * stop + 3 * second * steps > whole - 3 * second
    assert after.tokens_before(stop + steps) == len(seen)


def test_a_row_over_a_seam_of_two_shuffled_windows_predicts_the_true_next_tokens(
    write_tokens: Callable[..., Path],
) -> None:
    folder = write_tokens("a", [400])
    data = open_training_data(section(folder, length=4, order="shuffled"), BatchSection(tokens_per_step=8), 3)
    after = resumed(section(folder, length=6, order="shuffled"), BatchSection(tokens_per_step=12), data, 3)
    rows = np.concatenate(global_rows(after, range(3, 8)))
    assert (rows[:, 6:12] == rows[:, :6] + 1).all()
    assert (np.diff(rows[:, :6], axis=1) != 1).any()


def test_a_row_length_that_comes_back_off_its_old_grid_reads_what_is_left_of_the_shuffled_epoch(
    write_tokens: Callable[..., Path],
) -> None:
    folder, read = write_tokens("a", [81]), []
    data = open_training_data(section(folder, length=4, order="shuffled"), BatchSection(tokens_per_step=8), 3)
    read += global_rows(data, range(2))
    data = resumed(section(folder, length=6, order="shuffled"), BatchSection(tokens_per_step=6), data, 2)
    read += global_rows(data, range(2, 3))
    data = resumed(section(folder, length=4, order="shuffled"), BatchSection(tokens_per_step=4), data, 3)
    read += global_rows(data, range(3, 17))
    places = np.concatenate([rows[:, : rows.shape[1] // 2].ravel() for rows in read]).tolist()
    assert len(places) == len(set(places)) == 78


def test_a_changed_weight_or_a_new_source_goes_on_where_each_source_stood(write_tokens: Callable[..., Path]) -> None:
    first, second, third = (
        write_tokens("a", [400]),
        write_tokens("b", [400], offset=1000),
        write_tokens("c", [400], offset=2000),
    )
    batch = BatchSection(tokens_per_step=32)
    data = open_training_data(section(first, second), batch, 3)
    read = starts(global_rows(data, range(5)))
    data = resumed(section(first, second, weights=(3.0, 1.0)), batch, data, 5)
    read += starts(global_rows(data, range(5, 9)))
    data = resumed(section(third, first), batch, data, 9)
    read += starts(global_rows(data, range(9, 12)))
    data = resumed(section(second, third), batch, data, 12)
    read += starts(global_rows(data, range(12, 15)))
    assert len(data.mixture.phases) == 4
    for low in (0, 1000, 2000):
        mine = [start - low for start in read if low <= start < low + 1000]
        assert mine == [8 * number for number in range(len(mine))]
    assert len(read) == 60 == data.samples_before(15)


def test_steps_of_an_earlier_phase_name_the_sources_as_the_recipe_does_now(write_tokens: Callable[..., Path]) -> None:
    first, second, batch = (
        write_tokens("a", [400]),
        write_tokens("b", [400], offset=1000),
        BatchSection(tokens_per_step=32),
    )
    data = open_training_data(section(first, second, weights=(3.0, 1.0)), batch, 3)
    turned = resumed(section(second, first), batch, data, 2)
    (then,), (now,) = global_rows(data, [1]), global_rows(turned, [1])
    assert np.array_equal(then[:, :-1], now[:, :-1])
    assert (then[:, -1] == 1 - now[:, -1]).all()
    with pytest.raises(InputError, match="read b, which the recipe no longer names"):
        global_rows(resumed(section(first), batch, data, 2), [1])


@pytest.mark.parametrize(
    ("change", "seed", "key"),
    [
        ({"order": "shuffled"}, 3, "data.order"),
        ({"document_mask": True}, 3, "data.document_mask"),
        ({"documents": "within"}, 3, "data.documents"),
        ({}, 4, "seed"),
    ],
)
def test_changes_of_the_order_itself_are_refused_unless_allowed(
    write_tokens: Callable[..., Path], change: dict[str, Any], seed: int, key: str
) -> None:
    chosen, batch = section(write_tokens("a", [400, 30])), BatchSection(tokens_per_step=32)
    state = open_training_data(chosen, batch, 3).state(2)
    changed = dataclasses.replace(chosen, **change)
    with pytest.raises(InputError, match=key):
        open_training_data(changed, batch, seed, state=state)
    allowed = open_training_data(changed, batch, seed, state=state, allow=frozenset({key}))
    assert [phase.first_step for phase in allowed.mixture.phases] == [0, 2]
    assert allowed.samples_before(2) == 8


def test_other_tokens_under_the_same_name_are_refused_unless_allowed(
    write_tokens: Callable[..., Path], tmp_path: Path
) -> None:
    folder, batch = write_tokens("a", [400]), BatchSection(tokens_per_step=32)
    state = open_training_data(section(folder), batch, 3).state(2)
    folder.rename(tmp_path / "old")
    other = write_tokens("a", [401])
    with pytest.raises(InputError, match="a holds other tokens"):
        open_training_data(section(other), batch, 3, state=state)
    allowed = open_training_data(section(other), batch, 3, state=state, allow=frozenset({"data.sources"}))
    assert starts(global_rows(allowed, [2]))[0] == 0


@pytest.mark.parametrize("order", [("sequential", "shuffled"), ("shuffled", "sequential")])
def test_after_an_allowed_change_of_order_the_next_epoch_begins(
    write_tokens: Callable[..., Path], order: tuple[str, str]
) -> None:
    folder, batch = write_tokens("a", [81]), BatchSection(tokens_per_step=40)
    before, after = section(folder, order=order[0]), section(folder, order=order[1])
    state = open_training_data(before, batch, 3).state(1)
    changed = open_training_data(after, batch, 3, state=state, allow=frozenset({"data.order"}))
    second_epoch = global_rows(open_training_data(after, batch, 3), range(2, 4))
    for found, expected in zip(global_rows(changed, range(1, 3)), second_epoch, strict=True):
        assert np.array_equal(found, expected)
    assert changed.passes(3) == {"a": 2.0}


def test_a_batch_change_in_the_past_is_refused_and_one_from_now_on_is_not(write_tokens: Callable[..., Path]) -> None:
    chosen, batch = section(write_tokens("a", [400])), BatchSection(tokens_per_step=32)
    state = open_training_data(chosen, batch, 3).state(5)
    for step in (2, 4):
        rewritten = BatchSection(tokens_per_step=32, steps=(BatchChange(step=step, tokens_per_step=64),))
        with pytest.raises(InputError, match="history cannot change"):
            open_training_data(chosen, rewritten, 3, state=state)
    now = BatchSection(tokens_per_step=32, steps=(BatchChange(step=5, tokens_per_step=64),))
    assert [open_training_data(chosen, now, 3, state=state).rows(step) for step in (4, 5)] == [4, 8]
