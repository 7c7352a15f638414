"""Packing: every conversation once an epoch, no row too long, full rows, and the same whatever was asked first."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.data import packing
from argonne.data.mixture import Mixture, Phase, PhaseSource
from argonne.data.packing import PackedRows, best_fit
from argonne.data.windows import Position, RowKey
from argonne.errors import InputError
from argonne.files import collect_temporaries

T = 32
KEY = RowKey(T, "shuffled", "packed", 7)
START = Position()
LENGTHS = st.lists(st.integers(1, T), min_size=1, max_size=60)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK", 16)


def packed(lengths: list[int], cache: Path | None = None, max_epochs: float = math.inf) -> PackedRows:
    return PackedRows("chat", "fingerprint", np.cumsum(lengths), cache, max_epochs)


def rows_of(
    source: PackedRows, draws: list[int], place: Position = START, key: RowKey = KEY
) -> list[tuple[list[tuple[int, int]], int]]:
    found, epochs = source.locate(key, place, np.array(draws))
    assert (found.start == -1).all()
    return [(found.runs[index], epoch) for index, epoch in enumerate(epochs.tolist())]


@given(lengths=LENGTHS)
def test_no_row_is_overfull_and_every_item_has_one(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths), T)
    held = np.bincount(rows, weights=lengths)
    assert held.max() <= T
    assert held.min() > 0


def best_fit_decreasing(lengths: np.ndarray, size: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [place for place, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(size - length)
        else:
            rooms[min(fitting, key=lambda place: rooms[place])] -= length
    return len(rooms)


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_fuller_than_those_of_best_fit_decreasing(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(60, 300, 800)
    rows = int(best_fit(lengths, 1024).max()) + 1
    assert rows <= best_fit_decreasing(lengths, 1024)
    assert lengths.sum() / rows / 1024 > 0.985


@settings(max_examples=40)
@given(lengths=LENGTHS, epoch=st.integers(0, 3))
def test_every_conversation_comes_once_an_epoch_whole(lengths: list[int], epoch: int) -> None:
    source = packed(lengths)
    rows = rows_of(source, list(range(source.epoch_rows(KEY, epoch))), Position(epoch))
    ends = np.cumsum(lengths)
    runs = sorted(run for found, _ in rows for run in found)
    assert runs == list(zip((ends - lengths).tolist(), lengths, strict=True))
    assert max(sum(size for _, size in found) for found, _ in rows) <= T


@settings(max_examples=40)
@given(lengths=LENGTHS, data=st.data())
def test_a_row_does_not_depend_on_what_was_asked_before_nor_on_where_counting_began(
    lengths: list[int], data: st.DataObject
) -> None:
    whole = rows_of(packed(lengths), list(range(3 * len(lengths))))
    asked = sorted(data.draw(st.sets(st.integers(0, len(whole) - 1), min_size=1)))
    assert rows_of(packed(lengths), asked) == [whole[number] for number in asked]
    done = data.draw(st.integers(0, asked[0]))
    place = packed(lengths).advance(KEY, Position(), done)
    assert rows_of(packed(lengths), [number - done for number in asked], place) == [whole[number] for number in asked]


@settings(max_examples=40)
@given(lengths=LENGTHS, first=st.integers(0, 90), second=st.integers(0, 90))
def test_advancing_twice_is_advancing_once(lengths: list[int], first: int, second: int) -> None:
    source = packed(lengths)
    between = source.advance(KEY, Position(), first)
    assert source.advance(KEY, between, second) == source.advance(KEY, Position(), first + second)
    assert source.passes(KEY, between, second) == pytest.approx(source.passes(KEY, Position(), first + second))


def test_seeds_and_epochs_put_other_conversations_together() -> None:
    source, found = packed([1 + number % 30 for number in range(50)]), set()
    for epoch, seed in ((0, 0), (1, 0), (0, 1)):
        key = RowKey(T, "shuffled", "packed", seed)
        rows = rows_of(source, list(range(source.epoch_rows(key, epoch))), Position(epoch), key)
        found.add(frozenset(frozenset(runs) for runs, _ in rows))
    assert len(found) == 3


def test_long_conversations_do_not_come_first() -> None:
    source = packed([T] * 8 + [1] * 8)
    assert rows_of(source, [0])[0] is not None
    sizes = [len(found) for found, _ in rows_of(source, list(range(source.epoch_rows(KEY, 0))))]
    places = [
        [len(found) for found, _ in rows_of(source, list(range(9)), Position(epoch))].index(8) for epoch in range(12)
    ]
    assert sorted(sizes) == [1] * 8 + [8]
    assert len(set(places)) > 3


def test_a_second_opening_packs_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [1 + number % 30 for number in range(50)]
    first = rows_of(packed(lengths, tmp_path), list(range(40)))
    monkeypatch.setattr(packing, "best_fit", None)
    assert rows_of(packed(lengths, tmp_path), list(range(40))) == first


def test_a_conversation_longer_than_a_row_is_refused() -> None:
    with pytest.raises(InputError, match=r"a conversation of 33 tokens .* row of 32; raise data.sequence_length"):
        packed([5, T + 1]).epoch_rows(KEY, 0)


def test_an_epoch_that_has_begun_is_not_packed_anew_for_shorter_rows() -> None:
    source = packed([3] * 40)
    longer = RowKey(2 * T, "shuffled", "packed", 7)
    place = source.advance(KEY, Position(), 2)
    assert source.rows_left(longer, place) == source.epoch_rows(KEY, 0) - 2
    with pytest.raises(InputError, match="begun with rows of 32 tokens"):
        source.rows_left(RowKey(16, "shuffled", "packed", 7), place)


def test_writers_of_one_block_with_one_process_id_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two threads are, or ranks in two containers that share a cache."""
    lengths, plain, met = [5, 9, 13] * 20, np.save, []

    def save_after_another(path: Path, array: np.ndarray) -> None:
        plain(path, array)
        if not met:
            met.append(path)
            packed(lengths, tmp_path).epoch_rows(KEY, 0)

    monkeypatch.setattr(np, "save", save_after_another)
    rows = packed(lengths, tmp_path).epoch_rows(KEY, 0)
    assert packed(lengths, tmp_path).epoch_rows(KEY, 0) == packed(lengths).epoch_rows(KEY, 0) == rows
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_block_whose_temporary_was_collected_by_another_run_is_packed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, plain = [5, 9, 13] * 20, np.save

    def save_and_lose(path: Path, array: np.ndarray) -> None:
        plain(path, array)
        collect_temporaries(tmp_path)

    monkeypatch.setattr(np, "save", save_and_lose)
    wanted = range(packed(lengths).epoch_rows(KEY, 0))
    assert rows_of(packed(lengths, tmp_path), list(wanted)) == rows_of(packed(lengths), list(wanted))


def test_a_mixture_of_conversations_keeps_shares_and_limits() -> None:
    windows = {name: PackedRows(name, name, np.cumsum([5] * 60), None, 2) for name in ("a", "b")}
    sources = tuple(PhaseSource(name, name, weight, Position(0, T, 0)) for name, weight in (("a", "1"), ("b", "3")))
    phase = Phase(0, 0, 4, T, "shuffled", "packed", True, 7, sources)
    mixture = Mixture([phase], windows, {"a": 2, "b": 2})
    rows = windows["b"].epoch_rows(KEY, 0) + windows["b"].epoch_rows(KEY, 1)
    mixture.check_rows(phase, rows)
    assert mixture.locate(phase, 0, 8).source.tolist().count(1) == 6
    with pytest.raises(InputError, match=r"b would be read .* max_epochs is 2"):
        mixture.check_rows(phase, 4 * rows // 3 + 4)


def test_a_limit_that_nobody_reaches_packs_no_epoch_that_is_not_read() -> None:
    rows = PackedRows("a", "a", np.cumsum([5] * 60), None, 1e9)
    phase = Phase(0, 0, 4, T, "shuffled", "packed", True, 7, (PhaseSource("a", "a", "1", Position(0, T, 0)),))
    Mixture([phase], {"a": rows}, {"a": 1e9}).check_rows(phase, 4)
    assert max(epoch for _, _, epoch, _ in rows._packed) < 64  # some way ahead
