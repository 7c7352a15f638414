"""How often a source may be read, and windows that are held out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import BatchChange, BatchSection
from argonne.data.dataset import open_training_data
from argonne.data.loader import Loader
from argonne.errors import InputError
from tests.data.rows import section
from tests.tokensets import HELD_OUT_FROM


def test_a_source_is_never_read_more_often_than_its_max_epochs(write_tokens: Callable[..., Path]) -> None:
    data = open_training_data(section(write_tokens("a", [81]), max_epochs=1.5), BatchSection(tokens_per_step=40), 3)
    data.check_steps(3)
    with pytest.raises(InputError, match=r"a would be read 2\.000 times, its max_epochs is 1\.5"):
        data.check_steps(4)
    loader = Loader(data, 0, 1, 2)
    assert loader.batch(2).count == 40
    with pytest.raises(InputError, match="max_epochs"):
        loader.batch(3)
    loader.close()
    assert data.passes(3) == {"a": 1.5}


def test_the_last_row_within_max_epochs_is_read_and_the_next_one_refused_also_in_a_later_phase(
    write_tokens: Callable[..., Path],
) -> None:
    batch = BatchSection(tokens_per_step=16, steps=(BatchChange(step=3, tokens_per_step=8),))
    data = open_training_data(section(write_tokens("a", [81]), max_epochs=1.5), batch, 3)
    with Loader(data, 0, 1, 2, prefetch=0) as loader:
        assert loader.batch(11).count == 8  # rows 0 to 14 of 10 an epoch
        with pytest.raises(InputError, match="max_epochs"):
            loader.batch(12)


def test_tokens_per_epoch_ends_where_the_first_source_is_used_up(write_tokens: Callable[..., Path]) -> None:
    first, second = write_tokens("a", [81]), write_tokens("b", [801], offset=1000)
    data = open_training_data(
        section(first, second, weights=(1.0, 3.0), max_epochs=1.0), BatchSection(tokens_per_step=8), 3
    )
    steps = data.tokens_per_epoch // 8
    assert 40 <= steps <= 43
    data.check_steps(steps)
    with pytest.raises(InputError, match="a would be read"):
        data.check_steps(steps + 1)


def test_held_out_windows_are_fixed_and_apart_from_training(write_tokens: Callable[..., Path]) -> None:
    data = open_training_data(
        section(write_tokens("a", [100], held_out=[100, 50])), BatchSection(tokens_per_step=16), 3
    )
    first = [batch["input_ids"].tolist() for batch in data.held_out(5, 2)]
    Loader(data, 0, 1, 2).batch(1)
    assert first == [batch["input_ids"].tolist() for batch in data.held_out(5, 2)]
    assert [len(rows) for rows in first] == [2, 2, 1]
    assert all(token >= HELD_OUT_FROM for rows in first for row in rows for token in row)
    assert sum(len(batch["input_ids"]) for batch in data.held_out(1000, 7)) == 18
