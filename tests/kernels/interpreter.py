"""Triton's interpreter, made right for bf16, switched on for a block of code and off again.

``with interpreter():`` runs every launch of a ``triton.jit`` kernel in numpy, on CPU tensors. It needs no environment
variable, so that the same process can also compile the kernels. Tests use the fixture ``interpreted``.

Made right (Triton 3.8 is silently wrong): a product of bf16 operands multiplied their bit patterns, fp32 -> bf16 cut
off instead of rounding to nearest even. Arithmetic on bf16 values, wrong as well, raises: kernels widen first.
Still hidden: TF32 (``input_precision``), contraction to fma, ``div`` that is not correctly rounded, races.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter as stock  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


# triton-lang/triton#9171: with numpy 2.4 any `range(0, n, step)` over a kernel argument raises.
BROKEN = _version(triton.__version__) < (3, 7) and _version(np.__version__) >= (2, 4)


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """Within the block, ``kernel[grid](...)`` is interpreted; afterwards Triton is as it was."""
    if BROKEN:
        pytest.skip(f"Triton {triton.__version__}'s interpreter fails with numpy {np.__version__}")
    builder, patch_language = stock.InterpreterBuilder, stock._patch_lang
    interpreted = functools.cache(stock.InterpretedFunction)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return interpreted(self.fn).run(*args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return interpreted(self.fn)(*args, **kwargs)

    @functools.cache
    def patch_once(fn: Any) -> Any:
        """Triton would patch its language at every launch and at every call from a kernel: a fifth of the time."""
        patch_language(fn)
        return types.SimpleNamespace(restore=lambda: None)  # the end of the block restores

    touched = [tl, tl.core, tl.math, tl.standard, tl.random, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base]
    before = [dict(vars(thing)) for thing in touched]
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(JITFunction, "__call__", call),
        mock.patch.object(stock, "_patch_lang", patch_once),
        mock.patch.object(builder, "cast_impl", _cast),
        mock.patch.object(builder, "create_fp_to_fp", lambda self, src, to, rounding: _cast(self, src, to)),
        mock.patch.object(builder, "create_dot", _dot(builder.create_dot)),
        mock.patch.object(builder, "binary_op", _no_bf16(builder.binary_op)),
        np.errstate(all="ignore"),
    ):
        try:
            yield
        finally:
            # Functions called from a kernel patch triton.language and never put it back.
            for thing, names in zip(touched, before, strict=True):
                for name, value in list(vars(thing).items()):
                    if name not in names and isinstance(thing, type):
                        delattr(thing, name)
                    elif name in names and names[name] is not value:
                        setattr(thing, name, names[name])


def to_bf16(values: Any) -> Any:
    """float -> the bits of bf16, to nearest even: uint16."""
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def from_bf16(bits: Any) -> Any:
    """The bits of bf16 -> float32, exactly."""
    return (np.asarray(bits, dtype=np.uint32) << 16).view(np.float32)


def _cast(self: Any, src: Any, to: Any) -> Any:
    source, target = src.dtype.scalar, to.scalar
    data = from_bf16(src.data) if source == tl.bfloat16 else src.data
    if target == tl.bfloat16:
        return stock.TensorHandle(to_bf16(data), target)
    return stock.TensorHandle(data.astype(stock._get_np_dtype(to)), target)


def _dot(create_dot: Any) -> Any:
    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    return dot


def _no_bf16(binary_op: Any) -> Any:
    def op(self: Any, lhs: Any, rhs: Any, function: Any) -> Any:
        assert lhs.dtype.scalar != tl.bfloat16, "arithmetic on bf16 values: widen to fp32 first"
        return binary_op(self, lhs, rhs, function)

    return op
