"""Attention of a single token in each row, in fp32 on a CPU: from what its heads are made of to what they found, in one
call. Kernels for many queries take longer to begin than so few numbers to end.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import carray, njit
from torch import Tensor

from argonne.serve.compiled import SUMS_IN_ANY_ORDER, Team, dot, exponential, norm_row, structure
from argonne.serve.instructions import pointer, taken

# x (rows, queries + 2 keys, size) fp32: heads of queries, keys and values. gain: (heads, size) fp32, and normed:
# (heads,) bool, which of them are normed; 0 where none is. cos, sin: (rows, size / 2) fp32; 0 without a rotation.
# held: (slots, 2 keys, capacity, size) fp32. slots, places: (rows,) int64; a row at a negative place is left out.
# window: keys that a query sees, its own among them; 0 for all. out: (rows, queries, size) fp32.
Heads = structure(
    "Heads", "x rows queries keys size gain normed cos sin held capacity slots places window out", "eps scale"
)
NEXT = Heads.next.offset


@njit(error_model="numpy")
def _head(one, row, head, into):  # type: ignore[no-untyped-def]
    """Of a row: normed and, if it is not of values, rotated."""
    size, heads = one.size, one.queries + 2 * one.keys
    x = carray(pointer(one.x + (row * heads + head) * size * 4), size, np.float32)
    into[:] = x
    if one.gain and carray(pointer(one.normed), heads, np.uint8)[head]:
        norm_row(x, carray(pointer(one.gain + head * size * 4), size, np.float32), one.eps, into)
    if one.cos and head < one.queries + one.keys:
        half = size // 2
        cos = carray(pointer(one.cos + row * half * 4), half, np.float32)
        sin = carray(pointer(one.sin + row * half * 4), half, np.float32)
        for at in range(half):
            first, second = into[at], into[half + at]
            into[at] = first * cos[at] - second * sin[at]
            into[half + at] = second * cos[at] + first * sin[at]


@njit(fastmath=SUMS_IN_ANY_ORDER, error_model="numpy")
def _scores(query, keys, scores):  # type: ignore[no-untyped-def]
    """K q, (seen,), four at a time. Returns the largest."""
    most, seen = np.float32(-np.inf), len(keys)
    for at in range(0, seen - 3, 4):
        first, second, third, fourth = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for lane in range(len(query)):
            first += query[lane] * keys[at, lane]
            second += query[lane] * keys[at + 1, lane]
            third += query[lane] * keys[at + 2, lane]
            fourth += query[lane] * keys[at + 3, lane]
        scores[at], scores[at + 1], scores[at + 2], scores[at + 3] = first, second, third, fourth
        most = max(most, max(max(first, second), max(third, fourth)))
    for at in range(seen - seen % 4, seen):
        scores[at] = dot(query, keys[at])
        most = max(most, scores[at])
    return most


@njit(fastmath=SUMS_IN_ANY_ORDER, error_model="numpy")
def _found(query, keys, values, weights, out):  # type: ignore[no-untyped-def]
    """softmax(K q) V: K, V (seen, size). weights: (seen,), to write in."""
    most, seen, total = _scores(query, keys, weights), len(keys), np.float32(0)
    for at in range(seen):
        weights[at] = exponential(weights[at] - most)
        total += weights[at]
    out[:] = np.float32(0)
    for at in range(0, seen - 3, 4):
        first, second, third, fourth = weights[at], weights[at + 1], weights[at + 2], weights[at + 3]
        for lane in range(len(out)):
            out[lane] += (first * values[at, lane] + second * values[at + 1, lane]) + (
                third * values[at + 2, lane] + fourth * values[at + 3, lane]
            )
    for at in range(seen - seen % 4, seen):
        for lane in range(len(out)):
            out[lane] += weights[at] * values[at, lane]
    for lane in range(len(out)):
        out[lane] /= total


def _attend(told):  # type: ignore[no-untyped-def]
    """Write the keys and values of all rows, and attend to all that theirs see."""
    record = carray(told, 1)
    one = record[0]
    queries, keys, size, capacity = one.queries, one.keys, one.size, one.capacity
    slots, places = carray(pointer(one.slots), one.rows, np.int64), carray(pointer(one.places), one.rows, np.int64)
    out = carray(pointer(one.out), (one.rows, queries, size), np.float32)
    query, weights, group = np.empty(size, np.float32), np.empty(capacity, np.float32), queries // keys
    piece = taken(record.ctypes.data + NEXT, 1)
    while piece < one.rows * keys:
        row, head = piece // keys, piece % keys
        place, start = places[row], one.held + (slots[row] * 2 * keys + head) * capacity * size * 4
        seen = min(one.window, place + 1) if one.window else place + 1
        if place < 0:
            out[row, head * group : (head + 1) * group] = np.float32(0)
        else:
            key = carray(pointer(start), (capacity, size), np.float32)
            value = carray(pointer(start + keys * capacity * size * 4), (capacity, size), np.float32)
            _head(one, row, queries + head, key[place])
            _head(one, row, queries + keys + head, value[place])
            for of_group in range(head * group, (head + 1) * group):
                _head(one, row, of_group, query)
                for lane in range(size):
                    query[lane] *= np.float32(one.scale)
                first = place + 1 - seen
                _found(query, key[first : place + 1], value[first : place + 1], weights, out[row, of_group])
        piece = taken(record.ctypes.data + NEXT, 1)


@cache
def _team() -> Team:
    return Team(_attend, Heads)


def attend(
    x: Tensor,
    held: Tensor,
    slots: Tensor,
    places: Tensor,
    queries: int,
    *,
    scale: float,
    window: int | None,
    turns: tuple[Tensor, Tensor] | None,
    gains: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """(rows, 1, queries x D) fp32 of x (rows, 1, heads x D) fp32: what each row's heads of queries find, once its keys
    and values are written to `held` (slots, heads of keys and values, capacity, D) at its slot and place, (rows,) int64
    or (rows, 1). A row whose place is negative gives zeros. turns: cos and sin, (rows, 1, D / 2). gains: (heads, D),
    (heads,) bool: those that are normed, and eps.
    """
    rows, size = len(x), held.shape[3]
    x, places = x.contiguous(), places.contiguous()
    out, told = x.new_empty(rows, 1, queries * size), Heads()
    told.x, told.rows, told.queries, told.keys, told.size = x.data_ptr(), rows, queries, held.shape[1] // 2, size
    told.held, told.capacity = held.data_ptr(), held.shape[2]
    told.slots, told.places, told.out = slots.data_ptr(), places.data_ptr(), out.data_ptr()
    told.window, told.scale = window or 0, scale
    if turns is not None:
        cos, sin = (table.contiguous() for table in turns)
        told.cos, told.sin = cos.data_ptr(), sin.data_ptr()
    if gains is not None:
        told.gain, told.normed, told.eps = gains[0].data_ptr(), gains[1].data_ptr(), gains[2]
    _team()(told)
    return out
