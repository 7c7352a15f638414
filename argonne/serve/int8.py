"""Products in int8, for x86 CPUs: rows of fp32 are rounded to 127 steps to each side, each row in steps of its own,
multiplied with rounded weights and summed in int32, which is exact. Compiled by numba for the processor it runs on.

Weights lie as its instructions take them: LANES outputs side by side, for each GROUP inputs after the other, so that a
matrix is read from its first byte to its last.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from argonne.errors import InputError
from argonne.serve.compiled import NEAREST, Team, exponential, norm_row, structure
from argonne.serve.instructions import (
    GROUP,
    LANES,
    TILES,
    float_of,
    pointer,
    taken,
    tile_of_1,
    tile_of_2,
    tile_of_4,
    tile_of_8,
)

SHIFT = 128  # of weights, which are multiplied without a sign
LEVELS = 127
MOST_INPUTS = (2**31 - 1) // (2 * SHIFT * LEVELS)
FEW = 8  # rows which every thread rounds for itself, sooner than one waits for another
LEAST = np.float32(1e-30)  # the largest value of a row at least: a row of zeros has no steps
LARGEST, WITHOUT_SIGN = np.int32(0x7F7FFFFF), np.int32(0x7FFFFFFF)  # bits of the largest finite number, and all but one
AS_IT_IS, NORMED, GATED = range(3)  # what is done to a row before it is rounded


def packed(whole: Tensor) -> Tensor:
    """(out, in) int8, -127 to 127, as (blocks, groups, LANES, GROUP) uint8, filled up with zeros. Raises InputError for
    more inputs than can be summed.
    """
    outputs, inputs = whole.shape
    if inputs > MOST_INPUTS:
        raise InputError(
            f"--quantize int8: found a layer of {inputs:,} inputs, expected {MOST_INPUTS:,} at most, whose products 32 "
            "bits hold; leave it out"
        )
    weight = torch.full((-(-outputs // LANES) * LANES, -(-inputs // GROUP) * GROUP), SHIFT, dtype=torch.uint8)
    weight[:outputs, :inputs] = (whole.short() + SHIFT).to(torch.uint8)
    return weight.view(-1, LANES, weight.shape[1] // GROUP, GROUP).transpose(1, 2).contiguous()


def unpacked(weight: Tensor, outputs: int, inputs: int) -> Tensor:
    """(out, in) int8, of what `packed` made."""
    lanes = weight.transpose(1, 2).reshape(weight.shape[0] * LANES, -1)[:outputs, :inputs]
    return (lanes.short() - SHIFT).to(torch.int8)


# `out` (rows, outputs) of `x` (rows, inputs) and a weight of `packed`, plus `plus` (rows, outputs) where there is one.
# Before a row is rounded, it is normed (`gain`, eps), or it is the first half's SiLU times the second of (2 inputs,).
# More than FEW rows are rounded into `whole` (rows, groups x GROUP) int8, `step` fp32 and `shift` int32 (rows,).
Product = structure(
    "Product",
    "x rows inputs weight blocks groups scale out outputs plus before gain whole step shift",
    "eps",
)
NEXT = Product.next.offset


@njit(error_model="numpy")
def _before(one, row, into):  # type: ignore[no-untyped-def]
    """The numbers of a row that are rounded."""
    size = one.inputs
    if one.before == AS_IT_IS:
        return carray(pointer(one.x + row * size * 4), size, np.float32)
    if one.before == NORMED:
        x, gain = carray(pointer(one.x + row * size * 4), size, np.float32), carray(pointer(one.gain), size, np.float32)
        norm_row(x, gain, one.eps, into)
    else:
        gate = carray(pointer(one.x + row * size * 8), size, np.float32)
        up = carray(pointer(one.x + row * size * 8 + size * 4), size, np.float32)
        for at in range(size):
            into[at] = gate[at] / (np.float32(1) + exponential(-gate[at])) * up[at]
    return into


@njit(error_model="numpy")
def _rounded(x, whole):  # type: ignore[no-untyped-def]
    """Round to whole numbers. Returns a step of them, NaN where a number is not finite, and SHIFT times their sum."""
    bits, most = x.view(np.int32), np.int32(0)
    for at in range(len(x)):
        most = max(most, np.int32(bits[at] & WITHOUT_SIGN))
    if most > LARGEST:
        whole[:] = 0
        return np.float32(np.nan), np.int32(0)
    step, total = max(float_of(most), LEAST) / np.float32(LEVELS), np.int32(0)
    for at in range(len(x)):
        nearest = np.int32((x[at] / step + NEAREST) - NEAREST)
        whole[at] = nearest
        total = np.int32(total + nearest)
    whole[len(x) :] = 0
    return step, np.int32(total * SHIFT)


def _round(told):  # type: ignore[no-untyped-def]
    """Round all rows."""
    record = carray(told, 1)
    one = record[0]
    whole = carray(pointer(one.whole), (one.rows, one.groups * GROUP), np.int8)
    step, shift = carray(pointer(one.step), one.rows, np.float32), carray(pointer(one.shift), one.rows, np.int32)
    own = np.empty(one.inputs, np.float32)
    row = taken(record.ctypes.data + NEXT, 1)
    while row < one.rows:
        step[row], shift[row] = _rounded(_before(one, row, own), whole[row])
        row = taken(record.ctypes.data + NEXT, 1)


@njit(error_model="numpy")
def _put(sums, shift, step, scale, plus, out):  # type: ignore[no-untyped-def]
    """What the sums stand for."""
    for row in range(len(out)):
        if out.shape[1] >= LANES:
            for lane in range(LANES):
                value = np.float32(np.int32(sums[row, lane] - shift[row])) * (scale[lane] * step[row])
                out[row, lane] = value + plus[row, lane] if len(plus) else value
        else:
            for lane in range(out.shape[1]):
                value = np.float32(np.int32(sums[row, lane] - shift[row])) * (scale[lane] * step[row])
                out[row, lane] = value + plus[row, lane] if len(plus) else value


@njit(error_model="numpy")
def _tile(weight, whole, sums):  # type: ignore[no-untyped-def]
    """Multiply the first of these rows with a block; how many. Of arrays it takes the addresses itself: numba frees one
    that its caller names no more.
    """
    rows, size = whole.shape
    x, into = whole.ctypes.data, sums.ctypes.data
    if rows >= 8:
        tile_of_8(weight, x, size, into)
        return 8
    if rows >= 4:
        tile_of_4(weight, x, size, into)
        return 4
    if rows >= 2:
        tile_of_2(weight, x, size, into)
        return 2
    tile_of_1(weight, x, size, into)
    return 1


def _multiply(told):  # type: ignore[no-untyped-def]
    """Multiply all rows with all blocks."""
    record = carray(told, 1)
    one = record[0]
    rows, blocks, size = one.rows, one.blocks, one.groups * GROUP
    scale = carray(pointer(one.scale), blocks * LANES, np.float32)
    out = carray(pointer(one.out), (rows, one.outputs), np.float32)
    plus = carray(pointer(one.plus), (rows if one.plus else 0, one.outputs), np.float32)
    if rows <= FEW:
        whole, own = np.empty((rows, size), np.int8), np.empty(one.inputs, np.float32)
        step, shift = np.empty(rows, np.float32), np.empty(rows, np.int32)
        for row in range(rows):
            step[row], shift[row] = _rounded(_before(one, row, own), whole[row])
    else:
        step, shift = carray(pointer(one.step), rows, np.float32), carray(pointer(one.shift), rows, np.int32)
        whole = carray(pointer(one.whole), (rows, size), np.int8)
    sums, some = np.empty((TILES[0], LANES), np.int32), max(1, blocks // 16)
    first = taken(record.ctypes.data + NEXT, some)
    while first < blocks:
        for block in range(first, min(first + some, blocks)):
            weight, lane, row = one.weight + block * size * LANES, block * LANES, 0
            while row < rows:
                end = row + _tile(weight, whole[row:], sums)
                _put(sums, shift[row:], step[row:], scale[lane:], plus[row:, lane:], out[row:end, lane:])
                row = end
        first = taken(record.ctypes.data + NEXT, some)


@cache
def _teams() -> tuple[Team, Team]:
    return Team(_round, Product), Team(_multiply, Product)


def multiply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    outputs: int,
    inputs: int,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    plus: Tensor | None = None,
) -> Tensor:
    """(..., outputs): x (..., inputs) fp32, rounded, by weights (outputs, inputs) of `packed`, times scale (blocks x
    LANES,). norm: a gain and an eps, by which x is normed before. gated: x is (..., 2 inputs), and what is multiplied
    is silu(first half) x second half. plus: (..., outputs) fp32, added to what is found.
    """
    round_all, multiply_all = _teams()
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], outputs)
    told, rows = Product(), out.numel() // outputs
    told.x, told.rows, told.inputs, told.out, told.outputs = x.data_ptr(), rows, inputs, out.data_ptr(), outputs
    told.weight, told.blocks, told.groups = weight.data_ptr(), weight.shape[0], weight.shape[1]
    told.scale, told.before = scale.data_ptr(), GATED if gated else AS_IT_IS
    if norm is not None:
        told.before, told.gain, told.eps = NORMED, norm[0].data_ptr(), norm[1]
    if plus is not None:
        plus = plus.contiguous()
        told.plus = plus.data_ptr()
    if rows > FEW:
        whole = torch.empty(rows, weight.shape[1] * GROUP, dtype=torch.int8)
        step, shift = x.new_empty(rows), x.new_empty(rows, dtype=torch.int32)
        told.whole, told.step, told.shift = whole.data_ptr(), step.data_ptr(), shift.data_ptr()
        round_all(told)
        told.next = 0
    multiply_all(told)
    return out
