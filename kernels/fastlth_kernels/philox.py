"""Philox4x32-10: the one random generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Counter-based: word j of draw (c0, c1, c2, c3) under a key is a pure function of these numbers, so any
element can be computed alone, in any order, on any device, and two programs agree without sharing state.

``philox`` is written once for Python integers, numpy uint64 arrays and torch int64 tensors: it uses
only products below 2^64, shifts, masks and exclusive-or, and where int64 wraps the low 64 bits stay right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF

Key = tuple[int, int]


def philox(c0: Any, c1: Any, c2: Any, c3: Any, key: Key) -> tuple[Any, Any, Any, Any]:
    """Four random 32-bit words per counter.

    c0..c3 are 32-bit values: integers, or numpy uint64 / torch int64 arrays that broadcast together;
    key is two 32-bit integers. The words come back in the same kind of container, each in [0, 2^32).
    """
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def words(start: int, count: int, key: Key, *, c2: int = 0, c3: int = 0) -> NDArray[np.uint32]:
    """``count`` consecutive words of the stream (c2, c3) from word ``start``: shape [count].

    Word i is output i % 4 of counter (i // 4, i // 4 >> 32, c2, c3).
    """
    first, last = start // 4, (start + count + 3) // 4
    blocks = np.arange(first, last, dtype=np.uint64)
    zero = np.zeros_like(blocks)
    drawn = philox(blocks & np.uint64(_LOW), blocks >> np.uint64(32), zero + np.uint64(c2), zero + np.uint64(c3), key)
    flat = np.stack(drawn, axis=1).reshape(-1).astype(np.uint32)
    return flat[start - 4 * first :][:count]
