"""The vector vocabulary of the CPU kernels: `Lanes`, 64 numbers that numba keeps in registers.

numba hands loops to LLVM and hopes that it finds the vectors; for these kernels it finds half of them. So a batch
of 64 images is a value here: ``load``, ``store``, ``a + b``, ``fma``, ``gate`` ... each a few LLVM instructions, for
float32 or float64. LLVM splits a `Lanes` into what the CPU has: four AVX-512 registers, eight of AVX2, sixteen of NEON.

Memory is one flat array, and a place in it is an offset in elements; ``load`` and ``store`` want multiples of 16.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

LANES = 64
GROUP = 16
"""entries whose gradients are made together"""

HAS_AVX512 = bool(llvm.get_host_cpu_features().get("avx512f", False))

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FAST = ("contract", "reassoc", "nsz", "arcp")  # NaN and infinity keep their meaning
Build = Callable[[Any, Any, Any, Any], Any]


class Vector(types.Type):  # type: ignore[misc]
    """The numba type of `count` numbers of one dtype in vector registers."""

    def __init__(self, dtype: Any, count: int = LANES) -> None:
        self.dtype, self.count = dtype, count
        super().__init__(name=f"Vector({dtype}, {count})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, _llvm(vector))


def _element(dtype: Any) -> Any:
    return ir.DoubleType() if dtype == types.float64 else ir.FloatType()


def _llvm(vector: Vector) -> Any:
    return ir.VectorType(_element(vector.dtype), vector.count)


def _constant(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _splat(b: Any, scalar: Any, count: int) -> Any:
    lone = b.insert_element(ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(lone, lone, ir.Constant(ir.VectorType(I32, count), [0] * count))


def _shuffle(b: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _call(b: Any, name: str, *args: Any) -> Any:
    """An LLVM intrinsic over vectors of one type, such as ``llvm.fma.v64f32``."""
    kind = args[0].type
    suffix = "f64" if isinstance(kind.element, ir.DoubleType) else "f32"
    function = ir.FunctionType(kind, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.{name}.v{kind.count}{suffix}"), args)


def _address(context: Any, b: Any, array_type: Any, array: Any, offset: Any, kind: Any) -> Any:
    """Where element ``offset`` of a flat numba array lies, as a pointer to ``kind``."""
    data = context.make_array(array_type)(context, b, array).data
    return b.bitcast(b.gep(data, [offset]), kind.as_pointer())


# ---- memory


def _lanes_of(memory: Any, count: int = LANES) -> Vector:
    return Vector(memory.dtype, count)


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, memory: Any, offset: Any) -> Any:
    """The 64 numbers at ``offset``."""
    lanes = _lanes_of(memory)

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.load(_address(context, b, sig.args[0], args[0], args[1], _llvm(lanes)), align=64)

    return lanes(memory, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, memory: Any, offset: Any, value: Any) -> Any:
    """Write 64 numbers at ``offset``."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        b.store(args[2], _address(context, b, sig.args[0], args[0], args[1], args[2].type), align=64)
        return context.get_dummy_value()

    return types.void(memory, types.int64, value), build


@intrinsic  # type: ignore[untyped-decorator]
def at(typing: Any, array: Any, index: Any) -> Any:
    """``array[index]`` for an index known not to be negative (numba looks each time)."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, b, args[0]).data
        return b.load(b.gep(data, [args[1]]))

    return array.dtype(array, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Bring the cache line of array[index] near, without waiting for it."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        pointer = b.bitcast(
            b.gep(context.make_array(sig.args[0])(context, b, args[0]).data, [args[1]]), I8.as_pointer()
        )
        function = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        read, near, data = ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)
        b.call(cgutils.get_or_insert_function(b.module, function, "llvm.prefetch.p0i8"), [pointer, read, near, data])
        return context.get_dummy_value()

    return types.void(array, types.int64), build


# ---- arithmetic


@intrinsic  # type: ignore[untyped-decorator]
def splat(typing: Any, x: Any) -> Any:
    """64 times the number x."""
    return Vector(x)(x), lambda context, b, sig, args: _splat(b, args[0], LANES)


@intrinsic  # type: ignore[untyped-decorator]
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z with one rounding; x may be a number."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        x = args[0] if isinstance(sig.args[0], Vector) else _splat(b, args[0], LANES)
        return _call(b, "fma", x, args[1], args[2])

    return y(x, y, z), build


def _operator(symbol: Any, instruction: str) -> None:
    @infer_global(symbol)
    class Typing(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            x, y = args
            return signature(x, x, y) if isinstance(x, Vector) and x == y else None

    @lower_builtin(symbol, Vector, Vector)  # type: ignore[untyped-decorator]
    def lower(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return getattr(b, instruction)(*args, flags=FAST)


for _symbol, _instruction in (
    (operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv"),
):  # fmt: skip
    _operator(_symbol, _instruction)


@intrinsic  # type: ignore[untyped-decorator]
def larger(typing: Any, x: Any, y: Any) -> Any:
    """The larger of x and y, lane by lane; NaN where x is NaN."""
    return x(x, y), lambda context, b, sig, args: b.select(b.fcmp_ordered(">", args[1], args[0]), args[1], args[0])


@intrinsic  # type: ignore[untyped-decorator]
def gate(typing: Any, x: Any, h: Any) -> Any:
    """x where h > 0, else 0: the backward pass of ReLU."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        zero = _constant(args[0].type, 0.0)
        return b.select(b.fcmp_ordered(">", args[1], zero), args[0], zero)

    return x(x, h), build


@intrinsic  # type: ignore[untyped-decorator]
def first(typing: Any, x: Any, count: Any) -> Any:
    """x in the first ``count`` lanes, 0 in the others."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        numbers = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
        inside = b.icmp_signed("<", numbers, _splat(b, args[1], LANES))
        return b.select(inside, args[0], _constant(args[0].type, 0.0))

    return x(x, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def where(typing: Any, bits: Any, x: Any) -> Any:
    """x in the lanes whose bit of the int64 ``bits`` is set (the lowest is lane 0), 0 in the others, NaN or not."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.select(b.bitcast(args[0], ir.VectorType(ir.IntType(1), LANES)), args[1], _constant(args[1].type, 0.0))

    return x(types.int64, x), build


@intrinsic  # type: ignore[untyped-decorator]
def total(typing: Any, x: Any) -> Any:
    """The sum of the lanes."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        v, n = args[0], LANES
        while n > 1:
            n //= 2
            v = b.fadd(_shuffle(b, v, v, list(range(n))), _shuffle(b, v, v, list(range(n, 2 * n))))
        return b.extract_element(v, ir.Constant(I32, 0))

    return x.dtype(x), build


@intrinsic  # type: ignore[untyped-decorator]
def rsqrt(typing: Any, x: Any) -> Any:
    """1 / sqrt(x) for x > 0. In float32 with AVX-512 an estimate of 14 bits and one Newton step, which leave an
    error of at most 2^-22; a division and a square root would take five times as long."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        x = args[0]
        if not (HAS_AVX512 and sig.args[0].dtype == types.float32):
            return b.fdiv(_constant(x.type, 1.0), _call(b, "sqrt", x))
        estimate = _by_16(b, "llvm.x86.avx512.rsqrt14.ps.512", x)
        half = b.fmul(b.fmul(x, estimate), _constant(x.type, -0.5))
        return b.fmul(estimate, _call(b, "fma", half, estimate, _constant(x.type, 1.5)))

    return x(x), build


@intrinsic  # type: ignore[untyped-decorator]
def reciprocal(typing: Any, x: Any) -> Any:
    """1 / x, made like ``rsqrt``."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        x = args[0]
        if not (HAS_AVX512 and sig.args[0].dtype == types.float32):
            return b.fdiv(_constant(x.type, 1.0), x)
        estimate = _by_16(b, "llvm.x86.avx512.rcp14.ps.512", x)
        return b.fmul(estimate, b.fsub(_constant(x.type, 2.0), b.fmul(x, estimate)))

    return x(x), build


def _by_16(b: Any, name: str, x: Any) -> Any:
    """An AVX-512 instruction of 16 floats, on all the lanes of x."""
    kind = ir.VectorType(ir.FloatType(), 16)
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind, kind, I16]), name)
    parts = [
        b.call(function, [_shuffle(b, x, x, list(range(i, i + 16))), _constant(kind, 0.0), ir.Constant(I16, -1)])
        for i in range(0, x.type.count, 16)
    ]
    return _joined(b, parts)


def _joined(b: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        width = 2 * parts[0].type.count
        parts = [_shuffle(b, x, y, list(range(width))) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@intrinsic  # type: ignore[untyped-decorator]
def exp(typing: Any, x: Any) -> Any:
    """e to the x for x <= 0. float32: Cephes' polynomial, error at most 2 units in the last place."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        x, kind = args[0], args[0].type
        if sig.args[0].dtype == types.float64:
            return _call(b, "exp", x)
        lowest = _constant(kind, -87.0)
        finite = b.select(b.fcmp_ordered(">", x, lowest), x, lowest)
        n = _call(b, "rint", b.fmul(finite, _constant(kind, 1.4426950408889634)))
        x = b.select(b.fcmp_ordered("<", x, lowest), lowest, x)  # a NaN goes through
        r = _call(b, "fma", n, _constant(kind, -0.693359375), x)
        r = _call(b, "fma", n, _constant(kind, 2.12194440e-4), r)
        y = _constant(kind, 1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            y = _call(b, "fma", y, r, _constant(kind, c))
        y = b.fadd(_call(b, "fma", b.fmul(y, r), r, r), _constant(kind, 1.0))
        ints = ir.VectorType(I32, LANES)
        power = b.shl(b.add(b.fptosi(n, ints), ir.Constant(ints, [127] * LANES)), ir.Constant(ints, [23] * LANES))
        return b.fmul(y, b.bitcast(power, kind))

    return x(x), build


# ---- gradients of kept weights


def _tree(rows: list[Any], b: Any) -> tuple[Any, list[int]]:
    """Sums of ``len(rows)`` vectors of 16, as one vector, and which row's sum each lane holds.

    Two vectors become one in each step, half of either's lanes added to the other half: for 16 rows 15 additions
    instead of 64. With ``b`` None only the second is computed.
    """
    order = [[i] * GROUP for i in range(len(rows))]
    block = GROUP // 2
    while block:
        lanes = [s + t + base for s in range(0, GROUP, 2 * block) for base in (0, GROUP) for t in range(block)]
        half = max(len(order) // 2, 1)
        pairs = [(i, i + half if len(order) > 1 else i) for i in range(half)]
        if b is not None:
            other = [lane + block for lane in lanes]
            rows = [
                b.fadd(_shuffle(b, rows[i], rows[j], lanes), _shuffle(b, rows[i], rows[j], other)) for i, j in pairs
            ]
        order = [[(order[i] + order[j])[lane] for lane in lanes] for i, j in pairs]
        block //= 2
    return rows[0], order[0]


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def store_dots(
    typing: Any, memory: Any, out: Any, d: Any, x: Any, pitch: Any, indices: Any, k: Any, count: Any, add: Any
) -> Any:
    """memory[out + i] = dot(d, row indices[k + i] of x) for i < count, a literal 4, 8 or 16; plus what is there
    where ``add`` is True. Row r of x is the `Lanes` at x + r * pitch."""
    size = count.literal_value

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        _, out, d, x, pitch, _, k, _, add = args
        lanes = _tree([None] * size, None)[1]
        parts: list[Any] = [None] * size
        data = context.make_array(sig.args[5])(context, b, args[5]).data
        for entry in range(size):
            column = b.zext(b.load(b.gep(data, [b.add(k, ir.Constant(I64, entry))])), I64)
            place = b.add(x, b.mul(column, pitch))
            row = b.load(_address(context, b, sig.args[0], args[0], place, d.type), align=64)
            parts[entry] = _folded(b, d, row)
        dots, _ = _tree(parts, b)
        dots = _shuffle(b, dots, dots, [lanes.index(entry) for entry in range(size)])
        there = _address(context, b, sig.args[0], args[0], out, dots.type)
        old = b.select(add, b.load(there, align=4), _constant(dots.type, 0.0))
        b.store(b.fadd(dots, old), there, align=4)
        return context.get_dummy_value()

    args = (memory, types.int64, d, types.int64, types.int64, indices, types.int64, count, types.boolean)
    return types.void(*args), build


def _folded(b: Any, x: Any, y: Any) -> Any:
    """x * y, summed from 64 lanes to 16."""
    part = [(_shuffle(b, v, v, list(range(i, i + GROUP)))) for i in range(0, LANES, GROUP) for v in (x, y)]
    folded = b.fmul(part[0], part[1])
    for u, v in zip(part[2::2], part[3::2], strict=True):
        folded = _call(b, "fma", u, v, folded)
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
                new[i], new[i + n] = _shuffle(b, rows[i], rows[i + n], low), _shuffle(b, rows[i], rows[i + n], high)
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
    scale: Any,
    shift: Any,
) -> Any:
    """16 pixels of 64 images, turned: the Lanes at out + f * pitch are pixel f of every image, times scale plus
    shift. Image i's 16 pixels begin at pixels[skip + places[first + i]]."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        memory, out, pitch, pixels, skip, places, first, scale, shift = args
        bytes16 = ir.VectorType(I8, GROUP)
        starts = context.make_array(sig.args[5])(context, b, places).data
        quads = []  # row i: pixel f of images 4i .. 4i+3 is its f-th 32-bit word
        for i in range(0, LANES, 4):
            four = []
            for j in range(4):
                start = b.add(skip, b.load(b.gep(starts, [b.add(first, ir.Constant(I64, i + j))])))
                four.append(b.load(_address(context, b, sig.args[3], pixels, start, bytes16), align=1))
            mixed = _joined(b, four)
            mixed = _shuffle(b, mixed, mixed, [GROUP * (t % 4) + t // 4 for t in range(LANES)])
            quads.append(b.bitcast(mixed, ir.VectorType(I32, GROUP)))
        real = _element(sig.args[0].dtype)
        a, c = _splat(b, scale, GROUP), _splat(b, shift, GROUP)
        for f, row in enumerate(_butterfly(b, quads)):
            images = b.bitcast(row, ir.VectorType(I8, LANES))
            for q in range(0, LANES, GROUP):  # by 16, since longer conversions spill registers
                part = b.uitofp(_shuffle(b, images, images, list(range(q, q + GROUP))), ir.VectorType(real, GROUP))
                place = b.add(b.add(out, b.mul(pitch, ir.Constant(I64, f))), ir.Constant(I64, q))
                there = _address(context, b, sig.args[0], memory, place, part.type)
                b.store(_call(b, "fma", part, a, c), there, align=64)
        return context.get_dummy_value()

    i64, real = types.int64, memory.dtype
    return types.void(memory, i64, i64, pixels, i64, places, i64, real, real), build


@intrinsic  # type: ignore[untyped-decorator]
def transpose16(typing: Any, memory: Any, source: Any, source_pitch: Any, target: Any, target_pitch: Any) -> Any:
    """memory[target + j * target_pitch + i] = memory[source + i * source_pitch + j] for i, j < 16."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        memory, source, source_pitch, target, target_pitch = args
        kind = ir.VectorType(_element(sig.args[0].dtype), GROUP)

        def place(start: Any, pitch: Any, i: int) -> Any:
            return _address(context, b, sig.args[0], memory, b.add(start, b.mul(pitch, ir.Constant(I64, i))), kind)

        rows = [b.load(place(source, source_pitch, i), align=64) for i in range(GROUP)]
        for i, row in enumerate(_butterfly(b, rows)):
            b.store(row, place(target, target_pitch, i), align=64)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(memory, i64, i64, i64, i64), build
