"""``philox.philox`` inside a Triton kernel: the same bits."""

from __future__ import annotations

from .launch import jit, tl


@jit
def philox_words(c0, c1, c2, key0, key1):  # type: ignore[no-untyped-def]
    """The four words of counter (c0, c1, c2, 0): uint32, of c0's shape, or [1] for a scalar. Integers of any type."""
    # full() takes a constant as well as a value: Triton makes a constant of an argument that is 1
    k0, k1 = tl.full((1,), key0, tl.uint32), tl.full((1,), key1, tl.uint32)
    b, c, zero = tl.full((1,), c1, tl.uint32), tl.full((1,), c2, tl.uint32), tl.full((1,), 0, tl.uint32)
    return tl.philox_impl(c0.to(tl.uint32) + zero, b, c, zero, k0, k1)
