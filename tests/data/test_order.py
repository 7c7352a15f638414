"""Which rows a run reads: each window once an epoch, the same global batches on any layout, resume as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from argonne.config import BatchChange, BatchSection, DataSection, SourceSection
from argonne.data.loader import TrainingData, open_training_data
from argonne.data.windows import DOCUMENT_FACTOR, EPOCH_FACTOR
from argonne.errors import InputError
from tests.data.conftest import HELD_OUT_FROM

SLOW = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def section(*paths: Path, length: int = 8, max_epochs: float = 100.0, weights: tuple[float, ...] = (), **more: Any) -> DataSection:
    sources = tuple(
        SourceSection(path=str(path), weight=weights[number] if weights else 1.0, max_epochs=max_epochs)
        for number, path in enumerate(paths)
    )
    return DataSection(sources=sources, sequence_length=length, **more)


def global_rows(data: TrainingData, steps: range | list[int], world: int = 1, micro: int = 3, prefetch: int = 0) -> list[np.ndarray]:
    """The rows of each step in global order, (rows, T) inputs and targets and the source, put together from all ranks."""
    found = []
    loaders = [data.loader(rank, world, micro, prefetch=prefetch) for rank in range(world)]
    for step in steps:
        rows = []
        batches = [loader.batch(step) for loader in loaders]
        assert len({len(batch.micro_batches) for batch in batches}) == 1
        for batch in batches:
            for micro_batch, sources in zip(batch.micro_batches, batch.sources, strict=True):
                keep = sources.numpy() >= 0
                assert (micro_batch["shift_labels"].numpy()[~keep] == -100).all()
                joined = np.concatenate(
                    [micro_batch["input_ids"].numpy(), micro_batch["shift_labels"].numpy(), sources.numpy()[:, None]], axis=1
                )
                rows.append(joined[keep])
        found.append(np.concatenate(rows))
        assert batches[0].tokens == data.rows(step) * data.sequence_length(step)
    for loader in loaders:
        loader.close()
    return found


def starts(rows: list[np.ndarray]) -> list[int]:
    """First token of each row (tokens are their own positions); checks that the row is a window and its targets are one further."""
    found = np.concatenate(rows)
    length = (found.shape[1] - 1) // 2
    inputs, labels = found[:, :length], found[:, length:-1]
    assert (inputs == inputs[:, :1] + np.arange(length)).all()
    assert (labels == inputs + 1).all()
    return inputs[:, 0].tolist()


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_each_window_of_each_epoch_is_read_exactly_once(write_tokens: Callable[..., Path], order: str) -> None:
    data = open_training_data(section(write_tokens("a", [50, 31, 20], shards=2), order=order), BatchSection(tokens_per_step=8 * 4), 7)
    read = starts(global_rows(data, range(9)))
    assert sorted(read[:12]) == sorted(read[12:24]) == sorted(read[24:]) == [8 * window for window in range(12)]
    assert (read[:12] == sorted(read[:12])) == (order == "sequential")
    assert order == "sequential" or read[:12] != read[12:24]


def test_each_seed_has_a_shuffled_order_of_its_own(write_tokens: Callable[..., Path]) -> None:
    chosen = section(write_tokens("a", [401]), order="shuffled")
    orders = [starts(global_rows(open_training_data(chosen, BatchSection(tokens_per_step=400), seed), [0])) for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_two_sources_of_one_size_are_shuffled_in_orders_of_their_own(write_tokens: Callable[..., Path]) -> None:
    first, second = write_tokens("a", [401]), write_tokens("b", [401], offset=1000)
    data = open_training_data(section(first, second, order="shuffled"), BatchSection(tokens_per_step=800), 3)
    read = starts(global_rows(data, [0]))
    assert [start for start in read if start < 1000] != [start - 1000 for start in read if start >= 1000]


@SLOW
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8).filter(lambda found: sum(found) > 9),
    shards=st.integers(1, 4),
    rows=st.integers(1, 9),
    length=st.integers(1, 8),
    order=st.sampled_from(["sequential", "shuffled"]),
    seed=st.integers(0, 1000),
)
def test_any_corpus_is_read_window_by_window_without_repeat_or_skip(
    write_tokens: Callable[..., Path], tmp_path: Path, lengths: list[int], shards: int, rows: int, length: int, order: str, seed: int
) -> None:
    folder = write_tokens(f"a{len(list(tmp_path.iterdir()))}", lengths, shards=shards)
    windows = (sum(lengths) - 1) // length
    data = open_training_data(section(folder, length=length, order=order), BatchSection(tokens_per_step=rows * length), seed)
    steps = -(-2 * windows // rows)
    read = starts(global_rows(data, range(steps)))
    expected = [length * window for window in range(windows)]
    assert sorted(read[:windows]) == sorted(read[windows : 2 * windows]) == expected


@SLOW
@given(world=st.integers(1, 7), micro=st.integers(1, 6), prefetch=st.integers(0, 3), rows=st.integers(1, 11))
def test_the_global_batch_does_not_depend_on_ranks_micro_batch_or_prefetch(
    write_tokens: Callable[..., Path], world: int, micro: int, prefetch: int, rows: int
) -> None:
    first, second = write_tokens("a", [90, 33]), write_tokens("b", [70], offset=1000)
    chosen = section(first, second, weights=(2.0, 1.0), order="shuffled")
    data = open_training_data(chosen, BatchSection(tokens_per_step=rows * 8), 3)
    alone, spread = global_rows(data, range(4)), global_rows(data, range(4), world, micro, prefetch)
    for one, many in zip(alone, spread, strict=True):
        assert np.array_equal(one, many)


def test_the_valid_tokens_of_all_ranks_add_up_to_the_batch(write_tokens: Callable[..., Path]) -> None:
    data = open_training_data(section(write_tokens("a", [200])), BatchSection(tokens_per_step=5 * 8), 3)
    batches = [data.loader(rank, 4, 2).batch(0) for rank in range(4)]
    assert [batch.valid_tokens for batch in batches] == [16, 8, 8, 8]
    assert sum(batch.valid_tokens for batch in batches) == batches[0].tokens == 40


def resumed(chosen: DataSection, batch: BatchSection, data: TrainingData, step: int) -> TrainingData:
    return open_training_data(chosen, batch, 3, state=json.loads(json.dumps(data.state(step))))


@SLOW
@given(stop=st.integers(0, 12), again=st.integers(0, 12), order=st.sampled_from(["sequential", "shuffled"]))
def test_resume_at_any_step_reads_what_an_uninterrupted_run_reads(
    write_tokens: Callable[..., Path], stop: int, again: int, order: str
) -> None:
    first, second = write_tokens("a", [90, 33]), write_tokens("b", [70], offset=1000)
    chosen = section(first, second, weights=(0.7, 0.3), order=order)
    batch = BatchSection(tokens_per_step=40, steps=(BatchChange(step=4, tokens_per_step=48), BatchChange(step=9, sequence_length=4)))
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


def test_a_row_over_a_seam_of_two_shuffled_windows_predicts_the_true_next_tokens(write_tokens: Callable[..., Path]) -> None:
    folder = write_tokens("a", [400])
    data = open_training_data(section(folder, length=4, order="shuffled"), BatchSection(tokens_per_step=8), 3)
    after = resumed(section(folder, length=6, order="shuffled"), BatchSection(tokens_per_step=12), data, 3)
    rows = np.concatenate(global_rows(after, range(3, 8)))
    assert (rows[:, 6:12] == rows[:, :6] + 1).all()
    assert (np.diff(rows[:, :6], axis=1) != 1).any()


def test_a_row_length_that_comes_back_off_its_old_grid_reads_what_is_left_of_the_shuffled_epoch(write_tokens: Callable[..., Path]) -> None:
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
    first, second, third = write_tokens("a", [400]), write_tokens("b", [400], offset=1000), write_tokens("c", [400], offset=2000)
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
    first, second, batch = write_tokens("a", [400]), write_tokens("b", [400], offset=1000), BatchSection(tokens_per_step=32)
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


def test_other_tokens_under_the_same_name_are_refused_unless_allowed(write_tokens: Callable[..., Path], tmp_path: Path) -> None:
    folder, batch = write_tokens("a", [400]), BatchSection(tokens_per_step=32)
    state = open_training_data(section(folder), batch, 3).state(2)
    folder.rename(tmp_path / "old")
    other = write_tokens("a", [401])
    with pytest.raises(InputError, match="a holds other tokens"):
        open_training_data(section(other), batch, 3, state=state)
    allowed = open_training_data(section(other), batch, 3, state=state, allow=frozenset({"data.sources"}))
    assert starts(global_rows(allowed, [2]))[0] == 0


@pytest.mark.parametrize("order", [("sequential", "shuffled"), ("shuffled", "sequential")])
def test_after_an_allowed_change_of_order_the_next_epoch_begins(write_tokens: Callable[..., Path], order: tuple[str, str]) -> None:
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


def test_a_source_is_never_read_more_often_than_its_max_epochs(write_tokens: Callable[..., Path]) -> None:
    data = open_training_data(section(write_tokens("a", [81]), max_epochs=1.5), BatchSection(tokens_per_step=40), 3)
    data.check_steps(3)
    with pytest.raises(InputError, match=r"a would be read 2\.000 times, its max_epochs is 1\.5"):
        data.check_steps(4)
    loader = data.loader(0, 1, 2)
    assert loader.batch(2).tokens == 40
    with pytest.raises(InputError, match="max_epochs"):
        loader.batch(3)
    loader.close()
    assert data.passes(3) == {"a": 1.5}


def test_the_last_row_within_max_epochs_is_read_and_the_next_one_refused_also_in_a_later_phase(write_tokens: Callable[..., Path]) -> None:
    batch = BatchSection(tokens_per_step=16, steps=(BatchChange(step=3, tokens_per_step=8),))
    data = open_training_data(section(write_tokens("a", [81]), max_epochs=1.5), batch, 3)
    with data.loader(0, 1, 2, prefetch=0) as loader:
        assert loader.batch(11).tokens == 8  # rows 0 to 14 of 10 an epoch
        with pytest.raises(InputError, match="max_epochs"):
            loader.batch(12)


def test_tokens_per_epoch_ends_where_the_first_source_is_used_up(write_tokens: Callable[..., Path]) -> None:
    first, second = write_tokens("a", [81]), write_tokens("b", [801], offset=1000)
    data = open_training_data(section(first, second, weights=(1.0, 3.0), max_epochs=1.0), BatchSection(tokens_per_step=8), 3)
    steps = data.tokens_per_epoch // 8
    assert 40 <= steps <= 43
    data.check_steps(steps)
    with pytest.raises(InputError, match="a would be read"):
        data.check_steps(steps + 1)


def test_first_windows_are_the_beginnings_of_the_long_enough_documents(write_tokens: Callable[..., Path]) -> None:
    data = open_training_data(section(write_tokens("a", [9, 8, 30, 3, 12]), documents="first-window"), BatchSection(tokens_per_step=24), 3)
    assert starts(global_rows(data, [0])) == [0, 17, 50]
    assert any("2 of 5 documents are too short" in line for line in data.description)


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_rows_within_documents_visit_each_document_once_an_epoch_at_the_familys_starts(
    write_tokens: Callable[..., Path], order: str
) -> None:
    lengths = [40, 8, 100, 9, 33]
    data = open_training_data(section(write_tokens("a", lengths), documents="within", order=order), BatchSection(tokens_per_step=32), 3)
    begins = np.cumsum([0, *lengths])[:-1]
    for epoch in range(3):
        expected = []
        for number, length in enumerate(lengths):
            if length > 8:
                spread = ((number + 1) * DOCUMENT_FACTOR + (epoch + 1) * EPOCH_FACTOR) % 2**64
                expected.append(int(begins[number]) + spread % (length - 8))
        read = starts(global_rows(data, [epoch]))
        assert sorted(read) == sorted(expected)
        assert order == "shuffled" or read == expected


def test_shuffled_documents_left_in_an_epoch_are_read_once_after_the_length_changes(write_tokens: Callable[..., Path]) -> None:
    lengths = [40, 8, 100, 9, 33, 50, 12, 17, 60, 20]
    folder, batch = write_tokens("a", lengths), BatchSection(tokens_per_step=32)
    data = open_training_data(section(folder, documents="first-window", order="shuffled"), batch, 3)
    read = starts(global_rows(data, [0]))
    after = resumed(section(folder, length=16, documents="first-window", order="shuffled"), BatchSection(tokens_per_step=16), data, 1)
    begins = np.cumsum([0, *lengths])[:-1]
    left = {int(begin) for begin, length in zip(begins, lengths, strict=True) if length > 16} - set(read)
    assert set(starts(global_rows(after, range(1, 1 + len(left))))) == left


def test_a_document_mask_restarts_positions_and_masks_the_targets_across_documents(write_tokens: Callable[..., Path]) -> None:
    data = open_training_data(section(write_tokens("a", [5, 8, 3, 30], shards=2), document_mask=True), BatchSection(tokens_per_step=16), 3)
    found = data.loader(0, 1, 2).batch(0)
    batch = found.micro_batches[0]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch["shift_labels"].tolist() == [[1, 2, 3, 4, -100, 6, 7, 8], [9, 10, 11, 12, -100, 14, 15, -100]]
    assert found.valid_tokens == 13


def test_where_a_format_keeps_no_document_ends_the_end_of_text_token_is_one(tmp_path: Path, numbers_folder: Path) -> None:
    end = 4095
    ids = np.array([1, 2, end, 4, 5, 6, 7, end, 9, 10, 11, 12, 13, 14, 15, 16, 17], dtype="<u2")
    (tmp_path / "raw.bin").write_bytes(ids.tobytes())
    sources = (SourceSection(path=f"raw-uint16:{tmp_path / 'raw.bin'}"),)
    chosen = DataSection(sources=sources, tokenizer=str(numbers_folder), sequence_length=8, document_mask=True)
    batch = open_training_data(chosen, BatchSection(tokens_per_step=16), 3).loader(0, 1, 2).batch(0).micro_batches[0]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch["shift_labels"].tolist() == [[2, end, -100, 5, 6, 7, end, -100], [10, 11, 12, 13, 14, 15, 16, 17]]


def test_held_out_windows_are_fixed_and_apart_from_training(write_tokens: Callable[..., Path]) -> None:
    data = open_training_data(section(write_tokens("a", [100], held_out=[100, 50])), BatchSection(tokens_per_step=16), 3)
    first = [batch["input_ids"].tolist() for batch in data.held_out_batches(5, 2)]
    data.loader(0, 1, 2).batch(1)
    assert first == [batch["input_ids"].tolist() for batch in data.held_out_batches(5, 2)]
    assert [len(rows) for rows in first] == [2, 2, 1]
    assert all(token >= HELD_OUT_FROM for rows in first for row in rows for token in row)
    assert data.held_out_windows == 18


def test_a_corpus_shorter_than_a_row_is_named(write_tokens: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="needs at least 9"):
        open_training_data(section(write_tokens("a", [8])), BatchSection(tokens_per_step=8), 3).loader(0, 1, 1).batch(0)


def test_the_reader_on_rank_0_gives_the_same_batches(write_tokens: Callable[..., Path]) -> None:
    folders = write_tokens("a", [5, 11, 6, 3, 40, 7, 12, 58, 9, 4, 145, 100]), write_tokens("b", [50, 13, 11], offset=1000)
    batch = BatchSection(tokens_per_step=7 * 8)
    plain = open_training_data(section(*folders, order="shuffled", document_mask=True), batch, 3)
    reading = open_training_data(section(*folders, order="shuffled", document_mask=True, reader="rank-0"), batch, 3)
    sent: list[Any] = []
    for rank in range(3):
        queue = list(sent)
        share = sent.append if rank == 0 else lambda tensor, queue=queue: tensor.copy_(queue.pop(0))
        with plain.loader(rank, 3, 2) as expected, reading.loader(rank, 3, 2, broadcast=share) as loader:
            for step in range(3):
                one, other = expected.batch(step), loader.batch(step)
                assert one.valid_tokens == other.valid_tokens
                for left, right in zip(one.micro_batches, other.micro_batches, strict=True):
                    assert all((left[name] == right[name]).all() for name in left)
                assert [part.tolist() for part in one.sources] == [part.tolist() for part in other.sources]


def test_under_rank_0_the_other_ranks_need_no_files(write_tokens: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_tokens("a", [300, 100])
    section_0 = section(folder, order="shuffled", reader="rank-0")
    reading = open_training_data(section_0, BatchSection(tokens_per_step=6 * 8), 3)
    copy = pickle.dumps(reading)
    sent: list[Any] = []
    with reading.loader(0, 2, 2, broadcast=sent.append) as loader:
        first = [loader.batch(step) for step in range(3)]
    folder.rename(tmp_path / "gone")
    with pickle.loads(copy).loader(1, 2, 2, broadcast=lambda tensor: tensor.copy_(sent.pop(0))) as loader:
        second = [loader.batch(step) for step in range(3)]
    (tmp_path / "gone").rename(folder)
    alone = open_training_data(section(folder, order="shuffled"), BatchSection(tokens_per_step=6 * 8), 3)
    for step, expected in enumerate(global_rows(alone, range(3))):
        rows = [part["input_ids"] for batch in (first[step], second[step]) for part in batch.micro_batches]
        valid = [part["shift_labels"][:, 0] >= 0 for batch in (first[step], second[step]) for part in batch.micro_batches]
        found = np.concatenate([part[keep].numpy() for part, keep in zip(rows, valid, strict=True)])
        assert np.array_equal(found, expected[:, :8])


def test_micro_rows_can_change_between_steps_without_changing_the_rows(write_tokens: Callable[..., Path]) -> None:
    data = open_training_data(section(write_tokens("a", [300])), BatchSection(tokens_per_step=4 * 8), 3)
    with data.loader(0, 1, 4) as loader:
        loader.batch(0)
        loader.set_micro_rows(1)
        batch = loader.batch(1)
    assert [part["input_ids"].tolist() for part in batch.micro_batches] == [[list(range(first, first + 8))] for first in (32, 40, 48, 56)]
