"""What threads of one compiled interval need: a barrier that yields, and denormals flushed to zero."""

from __future__ import annotations

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import compiled

X86 = platform.machine().lower() in ("x86_64", "amd64")
YIELD = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
SPINS = 200  # a barrier between undisturbed threads takes fewer; past it a neighbour has the core, and yielding helps
FLUSH = 0x8040  # the two bits of MXCSR that turn denormal operands and results into zero

I32, I64 = ir.IntType(32), ir.IntType(64)


@intrinsic  # type: ignore[untyped-decorator]
def _arrive(typing: Any, counter: Any) -> Any:
    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, b, args[0]).data
        b.atomic_rmw("add", data, ir.Constant(I64, 1), "seq_cst")
        return context.get_dummy_value()

    return types.void(counter), build


@intrinsic  # type: ignore[untyped-decorator]
def _arrived(typing: Any, counter: Any) -> Any:
    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.load_atomic(context.make_array(sig.args[0])(context, b, args[0]).data, "acquire", 8)

    return types.int64(counter), build


@intrinsic  # type: ignore[untyped-decorator]
def _give_way(typing: Any) -> Any:
    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, []), YIELD), [])
        return context.get_dummy_value()

    return types.void(), build


@intrinsic  # type: ignore[untyped-decorator]
def _pause(typing: Any) -> Any:
    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        if X86:
            function = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, function, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), build


@intrinsic  # type: ignore[untyped-decorator]
def flush_denormals(typing: Any, on: Any) -> Any:
    """Turn flushing on this thread on (FLUSH) or to what an earlier call returned; returns what it was.

    Softmax residuals and Adam's moments decay into denormals, and arithmetic on these is many times slower.
    """

    def build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        if not X86:
            return ir.Constant(I32, 0)
        place = cgutils.alloca_once(b, I32)
        pointer = b.bitcast(place, ir.IntType(8).as_pointer())
        move = ir.FunctionType(ir.VoidType(), [pointer.type])
        b.call(cgutils.get_or_insert_function(b.module, move, "llvm.x86.sse.stmxcsr"), [pointer])
        before = b.load(place)
        b.store(b.or_(b.and_(before, ir.Constant(I32, ~FLUSH)), b.and_(args[0], ir.Constant(I32, FLUSH))), place)
        b.call(cgutils.get_or_insert_function(b.module, move, "llvm.x86.sse.ldmxcsr"), [pointer])
        return before

    return types.int32(types.int32), build


@compiled
def wait(counter: Any, target: int) -> None:
    """Count this thread in, and wait until ``target`` arrivals were counted. ``counter``: int64 [1], 0 at the start."""
    _arrive(counter)
    spins = 0
    while _arrived(counter) < target:
        spins += 1
        if spins > SPINS:
            _give_way()
        else:
            _pause()
