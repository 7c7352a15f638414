"""Attention of single tokens against its formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from argonne.serve.heads import attend

EPS = 0.01


class Case:
    """Rows at random places of random slots, whose first row is at place `capacity` - 1."""

    def __init__(self, rows: int, keys: int, group: int, size: int, capacity: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.queries, self.keys = keys * group, keys
        self.x = torch.randn(rows, self.queries + 2 * keys, size, generator=draw)
        self.held = torch.randn(rows + 2, 2 * keys, capacity, size, generator=draw)
        self.slots = torch.randperm(rows + 2, generator=draw)[:rows]
        self.places = torch.randint(0, capacity, (rows,), generator=draw)
        self.places[0] = capacity - 1
        angles = 6 * torch.rand(rows, size // 2, generator=draw)
        self.turns = angles.cos(), angles.sin()
        self.gains = (
            torch.rand(self.x.shape[1:], generator=draw),
            torch.rand(self.x.shape[1], generator=draw) > 0.5,
            EPS,
        )

    def found(self, **how: Any) -> Tensor:
        told = {"scale": 0.3, "window": None, "turns": self.turns, "gains": self.gains, **how}
        found = attend(self.x.flatten(1)[:, None], self.held, self.slots, self.places, queries=self.queries, **told)
        return found[:, 0]

    def expected(self, window: int | None = None, turns: bool = True, gains: bool = True) -> tuple[Tensor, Tensor]:
        """What is found, and the buffer behind it."""
        x, held, size = self.x.double(), self.held.double(), self.x.shape[2]
        if gains:
            normed = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * self.gains[0]
            x = torch.where(self.gains[1][:, None], normed, x)
        if turns:
            cos, sin = (table[:, None].double() for table in self.turns)
            turned, low, high = x[:, : self.queries + self.keys], *x[:, : self.queries + self.keys].chunk(2, -1)
            turned.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), -1))
        rows = []
        for row, (slot, place) in enumerate(zip(self.slots.tolist(), self.places.tolist(), strict=True)):
            held[slot, :, place] = x[row, self.queries :]
            first = 0 if window is None else max(0, place + 1 - window)
            key, value = held[slot, :, first : place + 1].chunk(2)
            query = x[row, : self.queries].view(self.keys, -1, size)
            rows.append((torch.softmax(query @ key.mT * 0.3, -1) @ value).flatten())
        return torch.stack(rows), held


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([2, 6, 16, 34]),
    st.sampled_from([1, 5, 64]),
    st.sampled_from([None, 1, 3, 70]),
    st.booleans(),
    st.booleans(),
)
def test_each_row_finds_what_the_formula_says(
    rows: int, keys: int, group: int, size: int, capacity: int, window: int | None, turns: bool, gains: bool
) -> None:
    case = Case(rows, keys, group, size, capacity)
    expected, held = case.expected(window, turns, gains)
    how = {} if turns else {"turns": None}
    found = case.found(window=window, **how, **({} if gains else {"gains": None}))
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.allclose(case.held.double(), held, atol=1e-5)


def test_a_row_depends_neither_on_its_neighbours_nor_on_their_number() -> None:
    many, alone = Case(4, 2, 3, 16, 64), Case(4, 2, 3, 16, 64)
    alone.x, alone.slots, alone.places = alone.x[2:3], alone.slots[2:3], alone.places[2:3]
    alone.turns = alone.turns[0][2:3], alone.turns[1][2:3]
    assert torch.equal(many.found()[2:3], alone.found())


def test_a_row_without_a_place_writes_nothing_and_finds_zeros() -> None:
    case = Case(3, 2, 2, 16, 8)
    case.places[1] = -1
    before = case.held.clone()
    found = case.found()
    assert not found[1].any()
    assert found[0].any()
    assert torch.equal(case.held[case.slots[1]], before[case.slots[1]])


@pytest.mark.parametrize("head", [0, 5, 7])
def test_what_is_not_a_number_stays_so(head: int) -> None:
    """In a query, a key or a value: of its own row alone."""
    case = Case(2, 2, 2, 16, 8)
    case.x[1, head, 3] = float("nan")
    found = case.found()
    assert bool(found[1].isnan().any())
    assert bool(found[0].isfinite().all())


def test_scores_beyond_what_an_exponential_holds_are_told_apart() -> None:
    case = Case(1, 1, 1, 16, 8)
    case.x[0, 1] = case.x[0, 0] = 9 * case.x[0, 0]  # a key like its query, and another nearly so
    case.held[case.slots[0], 0, 0] = 0.999 * case.x[0, 0]
    assert float(0.3 * case.x[0, 0].pow(2).sum()) > 90
    expected, _ = case.expected(turns=False, gains=False)
    assert torch.allclose(case.found(turns=None, gains=None).double(), expected, rtol=1e-4, atol=1e-4)


def test_memory_that_is_not_in_a_row_is_read_in_order() -> None:
    case, same = Case(3, 2, 2, 16, 8), Case(3, 2, 2, 16, 8)
    expected = case.found()
    same.x = same.x.transpose(0, 1).contiguous().transpose(0, 1)
    same.places = torch.stack((same.places, same.places), 1)[:, 0]
    same.turns = same.turns[0].T.contiguous().T, same.turns[1].T.contiguous().T
    assert torch.equal(same.found(), expected)
