"""What compiled functions need of a processor below Python: LLVM's instructions, for numba's functions.

A tile is a block of weights times a few rows. Where a processor has VNNI, one instruction multiplies the next four
numbers of a row with the four weights of each of sixteen outputs and adds up the products.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

intrinsic: Any = extending.intrinsic  # its first argument is numba's own
LANES, GROUP = 16, 4
TILES = (8, 4, 2, 1)  # rows that are multiplied together
BYTE, WORD, LONG = (ir.IntType(bits) for bits in (8, 32, 64))
SUMS = ir.VectorType(WORD, LANES)


def _spread(builder: Any, four: Any) -> Any:
    """Four bytes, for each lane."""
    any_lanes = ir.Constant(SUMS, ir.Undefined)
    first = builder.insert_element(any_lanes, four, ir.Constant(WORD, 0))
    return builder.shuffle_vector(first, any_lanes, ir.Constant(SUMS, [0] * LANES))


def _every_second(builder: Any, vector: Any, first: int) -> Any:
    count = vector.type.count
    places = ir.Constant(ir.VectorType(WORD, count // 2), list(range(first, count, 2)))
    return builder.shuffle_vector(vector, vector, places)


def _by_vnni(builder: Any, sums: Any, weights: Any, four: Any) -> Any:
    """sums + the products of each lane's four weights with four numbers."""
    add = ir.InlineAsm(ir.FunctionType(SUMS, [SUMS] * 3), "vpdpbusd $2, $1, $0", "=v,v,v,0")
    return builder.call(add, [weights, _spread(builder, four), sums])


def _by_words(builder: Any, sums: Any, weights: Any, four: Any) -> Any:
    """The same for any x86, as sums of two, which SSE2 and AVX2 have an instruction for."""
    size = LANES * GROUP
    in_bytes, in_words = ir.VectorType(BYTE, size), ir.VectorType(WORD, size)
    weights = builder.zext(builder.bitcast(weights, in_bytes), in_words)
    product = builder.mul(weights, builder.sext(builder.bitcast(_spread(builder, four), in_bytes), in_words))
    return builder.add(sums, builder.add(_every_second(builder, product, 0), _every_second(builder, product, 1)))


def _tile(rows: int) -> Any:
    """Sums (rows, LANES) of a block of weights and so many rows of x, by their addresses. inputs: of a row."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weight, x, inputs, sums = arguments
        vnni = "+avx512vnni" in context.codegen().magic_tuple()[2]
        multiplied, kind = (_by_vnni, SUMS) if vnni else (_by_words, ir.VectorType(WORD, 2 * LANES))

        def behind(start: Any, count: Any) -> Any:
            return builder.add(start, ir.Constant(LONG, count) if isinstance(count, int) else count)

        def read(address: Any, kind: Any, align: int) -> Any:
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)

        starts = [behind(x, builder.mul(inputs, ir.Constant(LONG, row))) for row in range(rows)]
        before, loop, after = builder.block, *(builder.append_basic_block(name) for name in ("loop", "after"))
        builder.branch(loop)
        builder.position_at_end(loop)
        at, held = builder.phi(LONG), [builder.phi(kind) for _ in range(rows)]
        weights = read(behind(weight, builder.mul(at, ir.Constant(LONG, LANES))), SUMS, 64)
        fours = [read(behind(start, at), WORD, GROUP) for start in starts]
        added = [multiplied(builder, total, weights, four) for total, four in zip(held, fours, strict=True)]
        following = behind(at, GROUP)
        at.add_incoming(ir.Constant(LONG, 0), before)
        at.add_incoming(following, loop)
        for phi, new in zip(held, added, strict=True):
            phi.add_incoming(ir.Constant(kind, [0] * kind.count), before)
            phi.add_incoming(new, loop)
        builder.cbranch(builder.icmp_signed("<", following, inputs), loop, after)
        builder.position_at_end(after)
        for row, new in enumerate(added):
            whole = new if vnni else builder.add(_every_second(builder, new, 0), _every_second(builder, new, 1))
            builder.store(whole, builder.inttoptr(behind(sums, row * LANES * 4), SUMS.as_pointer()), align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile(context: Any, weight: Any, x: Any, inputs: Any, sums: Any) -> Any:
        return types.void(types.intp, types.intp, types.intp, types.intp), code

    return tile


tile_of_8, tile_of_4, tile_of_2, tile_of_1 = (_tile(rows) for rows in TILES)


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), code


@intrinsic
def float_of(context: Any, bits: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), code


@intrinsic
def taken(context: Any, counter: Any, count: Any) -> Any:
    """What the counter at an address holds, before `count` is added to it: no two threads are told the same."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counter = builder.inttoptr(arguments[0], LONG.as_pointer())
        return builder.atomic_rmw("add", counter, arguments[1], "monotonic")

    return types.intp(types.intp, types.intp), code
