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

HAS_AVX512, HAS_AVX2 = (bool(llvm.get_host_cpu_features().get(name, False)) for name in ("avx512f", "avx2"))

TWO_SUMS = HAS_AVX512
"""Whether a long sum of `Lanes` is made as two: one in AVX-512's four registers would wait for itself; in AVX2's eight
it does not, and two would leave no register for anything else."""

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


def element_of(dtype: Any) -> Any:
    """LLVM's type of one lane."""
    return ir.DoubleType() if dtype == types.float64 else ir.FloatType()


def _llvm(vector: Vector) -> Any:
    return ir.VectorType(element_of(vector.dtype), vector.count)


def constant(kind: Any, value: float) -> Any:
    """A vector of LLVM's type ``kind`` with ``value`` in every lane."""
    return ir.Constant(kind, [value] * kind.count)


def splatted(b: Any, scalar: Any, count: int) -> Any:
    """A vector of ``count`` lanes, each ``scalar``."""
    lone = b.insert_element(ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(lone, lone, ir.Constant(ir.VectorType(I32, count), [0] * count))


def shuffled(b: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    """Lanes of x and y put together: lane i is number lanes[i] of x, or of y counted on from x's end."""
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def called(b: Any, name: str, *args: Any) -> Any:
    """An LLVM intrinsic over vectors of one type, such as ``llvm.fma.v64f32``."""
    kind = args[0].type
    suffix = "f64" if isinstance(kind.element, ir.DoubleType) else "f32"
    function = ir.FunctionType(kind, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.{name}.v{kind.count}{suffix}"), args)


def address_of(context: Any, b: Any, array_type: Any, array: Any, offset: Any, kind: Any) -> Any:
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
        return b.load(address_of(context, b, sig.args[0], args[0], args[1], _llvm(lanes)), align=64)

    return lanes(memory, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def load_like(typing: Any, memory: Any, offset: Any, other: Any) -> Any:
    """As many numbers at ``offset`` as ``other`` has lanes."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.load(address_of(context, b, sig.args[0], args[0], args[1], args[2].type), align=64)

    return other(memory, types.int64, other), build


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, memory: Any, offset: Any, value: Any) -> Any:
    """Write the lanes of ``value`` at ``offset``."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        b.store(args[2], address_of(context, b, sig.args[0], args[0], args[1], args[2].type), align=64)
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
    return Vector(x)(x), lambda context, b, sig, args: splatted(b, args[0], LANES)


@intrinsic  # type: ignore[untyped-decorator]
def splat_like(typing: Any, x: Any, other: Any) -> Any:
    """The number x in as many lanes as ``other`` has."""
    return other(x, other), lambda context, b, sig, args: splatted(b, args[0], args[1].type.count)


@intrinsic  # type: ignore[untyped-decorator]
def times(typing: Any, x: Any, y: Any) -> Any:
    """The number x times each lane of y."""
    return y(x, y), lambda context, b, sig, args: b.fmul(splatted(b, args[0], args[1].type.count), args[1], flags=FAST)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def quarter(typing: Any, x: Any, which: Any) -> Any:
    """A quarter of the lanes of x: number ``which``, a literal 0 to 3."""
    size, begin = x.count // 4, which.literal_value * (x.count // 4)

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return shuffled(b, args[0], args[0], list(range(begin, begin + size)))

    return Vector(x.dtype, size)(x, which), build


@intrinsic  # type: ignore[untyped-decorator]
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z with one rounding; x may be a number."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        x = args[0] if isinstance(sig.args[0], Vector) else splatted(b, args[0], args[1].type.count)
        return called(b, "fma", x, args[1], args[2])

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
        zero = constant(args[0].type, 0.0)
        return b.select(b.fcmp_ordered(">", args[1], zero), args[0], zero)

    return x(x, h), build


@intrinsic  # type: ignore[untyped-decorator]
def first(typing: Any, x: Any, count: Any) -> Any:
    """x in the first ``count`` lanes, 0 in the others."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        numbers = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
        inside = b.icmp_signed("<", numbers, splatted(b, args[1], LANES))
        return b.select(inside, args[0], constant(args[0].type, 0.0))

    return x(x, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def where(typing: Any, bits: Any, x: Any) -> Any:
    """x in the lanes whose bit of the int64 ``bits`` is set (the lowest is lane 0), 0 in the others, NaN or not."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.select(b.bitcast(args[0], ir.VectorType(ir.IntType(1), LANES)), args[1], constant(args[1].type, 0.0))

    return x(types.int64, x), build


@intrinsic  # type: ignore[untyped-decorator]
def nonzero(typing: Any, x: Any) -> Any:
    """An int64 whose bit i (the lowest is 0) says that lane i is not 0; NaN is not."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.bitcast(b.fcmp_unordered("!=", args[0], constant(args[0].type, 0.0)), I64)

    return types.int64(x), build


@intrinsic  # type: ignore[untyped-decorator]
def total(typing: Any, x: Any) -> Any:
    """The sum of the lanes."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        v, n = args[0], LANES
        while n > 1:
            n //= 2
            v = b.fadd(shuffled(b, v, v, list(range(n))), shuffled(b, v, v, list(range(n, 2 * n))))
        return b.extract_element(v, ir.Constant(I32, 0))

    return x.dtype(x), build


@intrinsic  # type: ignore[untyped-decorator]
def rsqrt(typing: Any, x: Any) -> Any:
    """1 / sqrt(x) for x > 0. In float32 on x86 an estimate y and one step of its series in e = 1 - x y^2, to the first
    power from 14 bits and to the second from 12, which leave an error of at most 2^-22; a division and a square root
    would take five times as long."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        x = args[0]
        if not (HAS_AVX2 and sig.args[0].dtype == types.float32):
            return b.fdiv(constant(x.type, 1.0), called(b, "sqrt", x))
        y = _estimated(b, "rsqrt", x)
        if HAS_AVX512:
            half = b.fmul(b.fmul(x, y), constant(x.type, -0.5))
            return b.fmul(y, called(b, "fma", half, y, constant(x.type, 1.5)))
        e = called(b, "fma", b.fneg(b.fmul(x, y)), y, constant(x.type, 1.0))
        return called(b, "fma", b.fmul(y, e), called(b, "fma", e, constant(x.type, 0.375), constant(x.type, 0.5)), y)

    return x(x), build


@intrinsic  # type: ignore[untyped-decorator]
def reciprocal(typing: Any, x: Any) -> Any:
    """1 / x, made like ``rsqrt`` with e = 1 - x y."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        x = args[0]
        if not (HAS_AVX2 and sig.args[0].dtype == types.float32):
            return b.fdiv(constant(x.type, 1.0), x)
        y = _estimated(b, "rcp", x)
        if HAS_AVX512:
            return b.fmul(y, b.fsub(constant(x.type, 2.0), b.fmul(x, y)))
        e = called(b, "fma", b.fneg(x), y, constant(x.type, 1.0))
        return called(b, "fma", y, called(b, "fma", e, e, e), y)

    return x(x), build


def _estimated(b: Any, name: str, x: Any) -> Any:
    """``rsqrt`` or ``rcp``, the CPU's own estimate of 14 bits (AVX-512) or 12 (AVX2), on all the lanes of x."""
    width, full = (16, f"avx512.{name}14.ps.512") if HAS_AVX512 else (8, f"avx.{name}.ps.256")
    kind = ir.VectorType(ir.FloatType(), width)
    unmasked = [constant(kind, 0.0), ir.Constant(I16, -1)] if HAS_AVX512 else []
    kinds = ir.FunctionType(kind, [kind, *(u.type for u in unmasked)])
    function = cgutils.get_or_insert_function(b.module, kinds, f"llvm.x86.{full}")
    parts = [shuffled(b, x, x, list(range(i, i + width))) for i in range(0, x.type.count, width)]
    return joined(b, [b.call(function, [part, *unmasked]) for part in parts])


def joined(b: Any, parts: list[Any]) -> Any:
    """The parts, a power of two of them, behind one another as one vector."""
    while len(parts) > 1:
        width = 2 * parts[0].type.count
        parts = [shuffled(b, x, y, list(range(width))) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@intrinsic  # type: ignore[untyped-decorator]
def exp(typing: Any, x: Any) -> Any:
    """e to the x for x <= 0. float32: Cephes' polynomial, error at most 2 units in the last place."""

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        x, kind = args[0], args[0].type
        if sig.args[0].dtype == types.float64:
            return called(b, "exp", x)
        lowest = constant(kind, -87.0)
        finite = b.select(b.fcmp_ordered(">", x, lowest), x, lowest)
        n = called(b, "rint", b.fmul(finite, constant(kind, 1.4426950408889634)))
        x = b.select(b.fcmp_ordered("<", x, lowest), lowest, x)  # a NaN goes through
        r = called(b, "fma", n, constant(kind, -0.693359375), x)
        r = called(b, "fma", n, constant(kind, 2.12194440e-4), r)
        y = constant(kind, 1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            y = called(b, "fma", y, r, constant(kind, c))
        y = b.fadd(called(b, "fma", b.fmul(y, r), r, r), constant(kind, 1.0))
        ints = ir.VectorType(I32, LANES)
        power = b.shl(b.add(b.fptosi(n, ints), ir.Constant(ints, [127] * LANES)), ir.Constant(ints, [23] * LANES))
        return b.fmul(y, b.bitcast(power, kind))

    return x(x), build
