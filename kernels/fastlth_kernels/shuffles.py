"""Words of the vector vocabulary that move numbers between lanes: many sums at once, transposes, pixels.

A sum over the lanes of one vector takes six dependent steps; of sixteen vectors together it takes one each.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import (
    HAS_AVX512,
    I8,
    I16,
    I32,
    I64,
    LANES,
    address_of,
    called,
    constant,
    element_of,
    joined,
    shuffled,
    splatted,
)

GROUP = 16
"""numbers in an AVX-512 register, and what is turned at a time"""
DOTS = 16 if HAS_AVX512 else 8
"""numbers in one register, and how many sums over lanes are made at a time"""


def _tree(rows: list[Any], width: int, b: Any) -> tuple[Any, list[int]]:
    """Sums of at most ``width`` vectors of ``width`` lanes, as one vector, and which row's sum each lane holds.

    Two vectors become one in each step, half of either's lanes added to the other half: for 16 rows 15 additions
    instead of 64. With ``b`` None only the second is computed.
    """
    order = [[i] * width for i in range(len(rows))]
    block = width // 2
    while block:
        lanes = [s + t + base for s in range(0, width, 2 * block) for base in (0, width) for t in range(block)]
        half = max(len(order) // 2, 1)
        pairs = [(i, i + half if len(order) > 1 else i) for i in range(half)]
        if b is not None:
            other = [lane + block for lane in lanes]
            rows = [
                b.fadd(shuffled(b, rows[i], rows[j], lanes), shuffled(b, rows[i], rows[j], other)) for i, j in pairs
            ]
        order = [[(order[i] + order[j])[lane] for lane in lanes] for i, j in pairs]
        block //= 2
    return rows[0], order[0]


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def store_dots(
    typing: Any, memory: Any, out: Any, d: Any, x: Any, pitch: Any, indices: Any, k: Any, count: Any, add: Any
) -> Any:
    """memory[out + i] = dot(d, row indices[k + i] of x) for i < count, a literal power of 2 up to DOTS; plus what is
    there where ``add`` is True. Row r of x is the `Lanes` at x + r * pitch."""
    size = count.literal_value

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        _, out, d, x, pitch, _, k, _, add = args
        lanes = _tree([None] * size, DOTS, None)[1]
        parts: list[Any] = [None] * size
        data = context.make_array(sig.args[5])(context, b, args[5]).data
        for entry in range(size):
            column = b.zext(b.load(b.gep(data, [b.add(k, ir.Constant(I64, entry))])), I64)
            place = b.add(x, b.mul(column, pitch))
            row = b.load(address_of(context, b, sig.args[0], args[0], place, d.type), align=64)
            parts[entry] = _folded(b, d, row)
        dots, _ = _tree(parts, DOTS, b)
        dots = shuffled(b, dots, dots, [lanes.index(entry) for entry in range(size)])
        there = address_of(context, b, sig.args[0], args[0], out, dots.type)
        old = b.select(add, b.load(there, align=4), constant(dots.type, 0.0))
        b.store(b.fadd(dots, old), there, align=4)
        return context.get_dummy_value()

    args = (memory, types.int64, d, types.int64, types.int64, indices, types.int64, count, types.boolean)
    return types.void(*args), build


def _folded(b: Any, x: Any, y: Any) -> Any:
    """x * y, summed from 64 lanes to DOTS."""
    part = [(shuffled(b, v, v, list(range(i, i + DOTS)))) for i in range(0, LANES, DOTS) for v in (x, y)]
    folded = b.fmul(part[0], part[1])
    for u, v in zip(part[2::2], part[3::2], strict=True):
        folded = called(b, "fma", u, v, folded)
    return folded


# ---- transposes


def _butterfly(b: Any, rows: list[Any]) -> list[Any]:
    """The transpose of 16 vectors of 16, in four stages."""
    n = GROUP // 2
    while n:
        low = [t if not t & n else GROUP + t - n for t in range(GROUP)]
        high = [t + n if not t & n else GROUP + t for t in range(GROUP)]
        new = list(rows)
        for i in range(GROUP):
            if not i & n:
                new[i], new[i + n] = shuffled(b, rows[i], rows[i + n], low), shuffled(b, rows[i], rows[i + n], high)
        rows, n = new, n // 2
    return rows


@intrinsic  # type: ignore[untyped-decorator]
def store_pixels(
    typing: Any,
    memory: Any,
    out: Any,
    pitch: Any,
    pixels: Any,
    skip: Any,
    places: Any,
    first: Any,
    ranks: Any,
    scale: Any,
    shift: Any,
) -> Any:
    """16 pixels of 64 images, turned: the Lanes at out + ranks[skip + f] * pitch are pixel f of every image, times
    scale plus shift. Image i's 16 pixels begin at pixels[skip + places[first + i]]."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        memory, out, pitch, pixels, skip, places, first, ranks, scale, shift = args
        bytes16 = ir.VectorType(I8, GROUP)
        starts = context.make_array(sig.args[5])(context, b, places).data
        rows = context.make_array(sig.args[7])(context, b, ranks).data
        quads = []  # row i: pixel f of images 4i .. 4i+3 is its f-th 32-bit word
        for i in range(0, LANES, 4):
            four = []
            for j in range(4):
                start = b.add(skip, b.load(b.gep(starts, [b.add(first, ir.Constant(I64, i + j))])))
                four.append(b.load(address_of(context, b, sig.args[3], pixels, start, bytes16), align=1))
            mixed = joined(b, four)
            mixed = shuffled(b, mixed, mixed, [GROUP * (t % 4) + t // 4 for t in range(LANES)])
            quads.append(b.bitcast(mixed, ir.VectorType(I32, GROUP)))
        real = element_of(sig.args[0].dtype)
        a, c = splatted(b, scale, GROUP), splatted(b, shift, GROUP)
        for f, row in enumerate(_butterfly(b, quads)):
            images = b.bitcast(row, ir.VectorType(I8, LANES))
            line = b.add(out, b.mul(pitch, b.load(b.gep(rows, [b.add(skip, ir.Constant(I64, f))]))))
            for q in range(0, LANES, GROUP):  # by 16, since longer conversions spill registers
                part = b.uitofp(shuffled(b, images, images, list(range(q, q + GROUP))), ir.VectorType(real, GROUP))
                place = b.add(line, ir.Constant(I64, q))
                there = address_of(context, b, sig.args[0], memory, place, part.type)
                b.store(called(b, "fma", part, a, c), there, align=64)
        return context.get_dummy_value()

    i64, real = types.int64, memory.dtype
    return types.void(memory, i64, i64, pixels, i64, places, i64, ranks, real, real), build


@intrinsic  # type: ignore[untyped-decorator]
def transpose16(typing: Any, memory: Any, source: Any, source_pitch: Any, target: Any, target_pitch: Any) -> Any:
    """memory[target + j * target_pitch + i] = memory[source + i * source_pitch + j] for i, j < 16."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        memory, source, source_pitch, target, target_pitch = args
        kind = ir.VectorType(element_of(sig.args[0].dtype), GROUP)

        def place(start: Any, pitch: Any, i: int) -> Any:
            return address_of(context, b, sig.args[0], memory, b.add(start, b.mul(pitch, ir.Constant(I64, i))), kind)

        rows = [b.load(place(source, source_pitch, i), align=64) for i in range(GROUP)]
        for i, row in enumerate(_butterfly(b, rows)):
            b.store(row, place(target, target_pitch, i), align=64)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(memory, i64, i64, i64, i64), build


# ---- images in rows, turned so that they are lanes, and back; bfloat16 comes as uint16


def _as_real(b: Any, x: Any, source: Any) -> Any:
    """A vector of 16 loaded from an array of ``source``: bfloat16 is the upper half of a float."""
    if source != types.uint16:
        return x
    wide = b.shl(b.zext(x, ir.VectorType(I32, GROUP)), ir.Constant(ir.VectorType(I32, GROUP), [16] * GROUP))
    return b.bitcast(wide, ir.VectorType(ir.FloatType(), GROUP))


def _as_stored(b: Any, x: Any, target: Any) -> Any:
    """The inverse, rounded to the nearest, halves to even; NaN stays NaN."""
    if target != types.uint16:
        return x
    ints = ir.VectorType(I32, GROUP)

    def each(value: int) -> Any:
        return ir.Constant(ints, [value] * GROUP)

    word = b.bitcast(x, ints)
    odd = b.and_(b.lshr(word, each(16)), each(1))
    rounded = b.lshr(b.add(b.add(word, odd), each(0x7FFF)), each(16))
    rounded = b.select(b.fcmp_unordered("uno", x, x), each(0x7FC0), rounded)
    return b.trunc(rounded, ir.VectorType(I16, GROUP))


def _row_of_16(context: Any, b: Any, array_type: Any, array: Any, offset: Any) -> Any:
    element = I16 if array_type.dtype == types.uint16 else element_of(array_type.dtype)
    return address_of(context, b, array_type, array, offset, ir.VectorType(element, GROUP))


@intrinsic  # type: ignore[untyped-decorator]
def turn_in(typing: Any, source: Any, begin: Any, stride: Any, count: Any, target: Any, place: Any, pitch: Any) -> Any:
    """target[place + j * pitch + i] = source[begin + i * stride + j] for i, j < 16; 0 for i >= ``count``."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        source, begin, stride, count, target, place, pitch = args
        kind = _row_of_16(context, b, sig.args[0], source, begin).type.pointee
        nothing = cgutils.alloca_once_value(b, ir.Constant(kind, [0] * GROUP))
        rows = []
        for i in range(GROUP):
            number = ir.Constant(I64, i)
            there = _row_of_16(context, b, sig.args[0], source, b.add(begin, b.mul(stride, number)))
            row = b.load(b.select(b.icmp_signed("<", number, count), there, nothing), align=2)
            rows.append(_as_real(b, row, sig.args[0].dtype))
        for j, row in enumerate(_butterfly(b, rows)):
            where = b.add(place, b.mul(pitch, ir.Constant(I64, j)))
            b.store(row, address_of(context, b, sig.args[4], target, where, row.type), align=64)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(source, i64, i64, i64, target, i64, i64), build


@intrinsic  # type: ignore[untyped-decorator]
def turn_out(typing: Any, source: Any, place: Any, pitch: Any, target: Any, begin: Any, stride: Any, count: Any) -> Any:
    """The inverse: target[begin + i * stride + j] = source[place + j * pitch + i] for i < ``count``, j < 16."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        source, place, pitch, target, begin, stride, count = args
        kind = ir.VectorType(element_of(sig.args[0].dtype), GROUP)
        rows = []
        for j in range(GROUP):
            where = b.add(place, b.mul(pitch, ir.Constant(I64, j)))
            rows.append(b.load(address_of(context, b, sig.args[0], source, where, kind), align=64))
        stored = _row_of_16(context, b, sig.args[3], target, begin).type.pointee
        nowhere = cgutils.alloca_once(b, stored)
        for i, row in enumerate(_butterfly(b, rows)):
            number = ir.Constant(I64, i)
            there = _row_of_16(context, b, sig.args[3], target, b.add(begin, b.mul(stride, number)))
            there = b.select(b.icmp_signed("<", number, count), there, nowhere)
            b.store(_as_stored(b, row, sig.args[3].dtype), there, align=2)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(source, i64, i64, target, i64, i64, i64), build


# ---- dot products that go on over many places


@intrinsic  # type: ignore[untyped-decorator]
def add_dots(
    typing: Any, memory: Any, sums: Any, x: Any, d0: Any, d1: Any, d2: Any, d3: Any, s1: Any, s2: Any, s3: Any
) -> Any:
    """Add to the 16 numbers at ``sums`` the products of four `Lanes` with those at x, x + s1, x + s2 and x + s3,
    folded from 64 lanes to 16."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        memory, sums, x, *rest = args
        lanes, places = rest[:4], [x, *(b.add(x, s) for s in rest[4:])]
        kind = ir.VectorType(element_of(sig.args[0].dtype), GROUP)
        there = address_of(context, b, sig.args[0], memory, sums, kind)
        chains = [b.load(there, align=64), None]
        for t, (d, place) in enumerate(zip(lanes, places, strict=True)):
            row = b.load(address_of(context, b, sig.args[0], memory, place, d.type), align=64)
            for i in range(0, LANES, GROUP):
                part = [shuffled(b, v, v, list(range(i, i + GROUP))) for v in (d, row)]
                old = chains[t % 2]
                chains[t % 2] = b.fmul(*part) if old is None else called(b, "fma", *part, old)
        b.store(b.fadd(*chains), there, align=64)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(memory, i64, i64, d0, d1, d2, d3, i64, i64, i64), build


@intrinsic  # type: ignore[untyped-decorator]
def total16(typing: Any, memory: Any, sums: Any, out: Any) -> Any:
    """memory[out + i] = the sum of the 16 numbers at sums + 16 i, for i < 16."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        memory, sums, out = args
        kind = ir.VectorType(element_of(sig.args[0].dtype), GROUP)
        rows = []
        for i in range(GROUP):
            place = b.add(sums, ir.Constant(I64, GROUP * i))
            rows.append(b.load(address_of(context, b, sig.args[0], memory, place, kind), align=64))
        totals, lanes = _tree(rows, GROUP, b)
        totals = shuffled(b, totals, totals, [lanes.index(i) for i in range(GROUP)])
        b.store(totals, address_of(context, b, sig.args[0], memory, out, kind), align=4)
        return context.get_dummy_value()

    return types.void(memory, types.int64, types.int64), build
