"""The search for the largest micro-batch, against every possible limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from argonne.train.micro_batch import largest_that_fits


@given(limit=st.integers(0, 300), guess=st.integers(1, 300), most=st.integers(1, 300))
def test_what_is_found_fits_and_nothing_much_larger_does(limit: int, guess: int, most: int) -> None:
    asked: list[int] = []

    def fits(rows: int) -> bool:
        asked.append(rows)
        return rows <= limit

    found = largest_that_fits(fits, guess, most)
    best = max(1, min(limit, most))
    assert found <= best
    assert found + max(1, found // 8) >= best
    assert all(1 <= rows <= most for rows in asked)
    assert len(asked) == len(set(asked)) <= 40
