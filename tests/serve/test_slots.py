"""Where keys and values lie: a pass sees what was written before it, in whatever rows and lengths the last one had."""

from __future__ import annotations

import torch

from argonne.serve.slots import LENGTH_STEP, Slots

CPU, HEADS, SIZE = torch.device("cpu"), 2, 4


def test_a_pass_sees_all_that_was_written_in_its_slots_whichever_rows_the_pass_before_it_had() -> None:
    torch.manual_seed(0)
    slots = Slots(3, 4 * LENGTH_STEP)
    expected = torch.zeros(3, 2 * HEADS, 4 * LENGTH_STEP, SIZE)
    passes = (
        ([0, 1, 2], 5),
        ([0, 1], 5),  # the same first row and length, fewer rows
        ([1, 2], 6),  # as many rows, another first
        ([2, 0], 7),  # no neighbours
        ([0, 1], LENGTH_STEP + 3),  # longer
        ([0, 1], LENGTH_STEP + 4),  # as the pass before
        ([0, 1], 8),  # shorter
    )
    for rows, place in passes:
        length = LENGTH_STEP if place < LENGTH_STEP else 2 * LENGTH_STEP
        slots.at(rows, torch.full((len(rows), 1), place), CPU)
        for layer in range(2):
            new = torch.randn(len(rows), 1, 2 * HEADS, SIZE)
            if layer == 0:
                expected[rows, :, place] = new[:, 0]
            keys, values = slots.write(layer, new)
            if layer == 0:
                assert torch.equal(keys, expected[rows, :HEADS, :length])
                assert torch.equal(values, expected[rows, HEADS:, :length])


def test_a_token_without_a_place_is_written_nowhere() -> None:
    slots = Slots(2, LENGTH_STEP)
    slots.at([0, 1], torch.tensor([[3], [-1]]), CPU)
    keys, values = slots.write(0, torch.ones(2, 1, 2 * HEADS, SIZE))
    assert torch.equal(keys[0, :, 3], torch.ones(HEADS, SIZE))
    assert not keys[1].any()
    assert not values[1].any()
