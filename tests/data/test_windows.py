"""Which rows a run reads: each window once an epoch, and where documents begin and end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.config import BatchSection, DataSection, SourceSection
from argonne.data.dataset import open_training_data
from argonne.data.loader import Loader
from argonne.data.windows import DOCUMENT_FACTOR, EPOCH_FACTOR
from argonne.errors import InputError
from tests.data.rows import SLOW, global_rows, resumed, section, starts


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_each_window_of_each_epoch_is_read_exactly_once(write_tokens: Callable[..., Path], order: str) -> None:
    data = open_training_data(
        section(write_tokens("a", [50, 31, 20], shards=2), order=order), BatchSection(tokens_per_step=8 * 4), 7
    )
    read = starts(global_rows(data, range(9)))
    assert sorted(read[:12]) == sorted(read[12:24]) == sorted(read[24:]) == [8 * window for window in range(12)]
    assert (read[:12] == sorted(read[:12])) == (order == "sequential")
    assert order == "sequential" or read[:12] != read[12:24]


def test_each_seed_has_a_shuffled_order_of_its_own(write_tokens: Callable[..., Path]) -> None:
    chosen = section(write_tokens("a", [401]), order="shuffled")
    orders = [
        starts(global_rows(open_training_data(chosen, BatchSection(tokens_per_step=400), seed), [0]))
        for seed in range(3)
    ]
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
    write_tokens: Callable[..., Path],
    tmp_path: Path,
    lengths: list[int],
    shards: int,
    rows: int,
    length: int,
    order: str,
    seed: int,
) -> None:
    folder = write_tokens(f"a{len(list(tmp_path.iterdir()))}", lengths, shards=shards)
    windows = (sum(lengths) - 1) // length
    data = open_training_data(
        section(folder, length=length, order=order), BatchSection(tokens_per_step=rows * length), seed
    )
    steps = -(-2 * windows // rows)
    read = starts(global_rows(data, range(steps)))
    expected = [length * window for window in range(windows)]
    assert sorted(read[:windows]) == sorted(read[windows : 2 * windows]) == expected


def test_first_windows_are_the_beginnings_of_the_long_enough_documents(write_tokens: Callable[..., Path]) -> None:
    data = open_training_data(
        section(write_tokens("a", [9, 8, 30, 3, 12]), documents="first-window"), BatchSection(tokens_per_step=24), 3
    )
    assert starts(global_rows(data, [0])) == [0, 17, 50]
    assert any("2 of 5 documents are too short" in line for line in data.description)


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_rows_within_documents_visit_each_document_once_an_epoch_at_the_familys_starts(
    write_tokens: Callable[..., Path], order: str
) -> None:
    lengths = [40, 8, 100, 9, 33]
    data = open_training_data(
        section(write_tokens("a", lengths), documents="within", order=order), BatchSection(tokens_per_step=32), 3
    )
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


def test_shuffled_documents_left_in_an_epoch_are_read_once_after_the_length_changes(
    write_tokens: Callable[..., Path],
) -> None:
    lengths = [40, 8, 100, 9, 33, 50, 12, 17, 60, 20]
    folder, batch = write_tokens("a", lengths), BatchSection(tokens_per_step=32)
    data = open_training_data(section(folder, documents="first-window", order="shuffled"), batch, 3)
    read = starts(global_rows(data, [0]))
    after = resumed(
        section(folder, length=16, documents="first-window", order="shuffled"),
        BatchSection(tokens_per_step=16),
        data,
        1,
    )
    begins = np.cumsum([0, *lengths])[:-1]
    left = {int(begin) for begin, length in zip(begins, lengths, strict=True) if length > 16} - set(read)
    assert set(starts(global_rows(after, range(1, 1 + len(left))))) == left


def test_a_document_mask_restarts_positions_and_masks_the_targets_across_documents(
    write_tokens: Callable[..., Path],
) -> None:
    data = open_training_data(
        section(write_tokens("a", [5, 8, 3, 30], shards=2), document_mask=True), BatchSection(tokens_per_step=16), 3
    )
    found = Loader(data, 0, 1, 2).batch(0)
    batch = found.micro_batches[0]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch["shift_labels"].tolist() == [[1, 2, 3, 4, -100, 6, 7, 8], [9, 10, 11, 12, -100, 14, 15, -100]]
    assert found.count == 13


def test_where_a_format_keeps_no_document_ends_the_end_of_text_token_is_one(
    tmp_path: Path, numbers_folder: Path
) -> None:
    end = 4095
    ids = np.array([1, 2, end, 4, 5, 6, 7, end, 9, 10, 11, 12, 13, 14, 15, 16, 17], dtype="<u2")
    (tmp_path / "raw.bin").write_bytes(ids.tobytes())
    sources = (SourceSection(path=f"raw-uint16:{tmp_path / 'raw.bin'}"),)
    chosen = DataSection(sources=sources, tokenizer=str(numbers_folder), sequence_length=8, document_mask=True)
    batch = Loader(open_training_data(chosen, BatchSection(tokens_per_step=16), 3), 0, 1, 2).batch(0).micro_batches[0]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch["shift_labels"].tolist() == [[2, end, -100, 5, 6, 7, end, -100], [10, 11, 12, 13, 14, 15, 16, 17]]


def test_a_corpus_shorter_than_a_row_is_named(write_tokens: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="needs at least 9"):
        Loader(open_training_data(section(write_tokens("a", [8])), BatchSection(tokens_per_step=8), 3), 0, 1, 1).batch(
            0
        )
