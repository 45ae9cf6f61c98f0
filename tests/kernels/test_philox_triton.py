"""Philox inside a kernel gives the bits of the reference."""

import numpy as np
import pytest
import torch
from fastlth_kernels.philox import philox

pytest.importorskip("triton")

from fastlth_kernels.launch import jit, tl
from fastlth_kernels.philox_triton import philox_words


@jit
def _draw(counters, out, c1, c2, key0, key1, N: tl.constexpr):
    i = tl.arange(0, N)
    w0, w1, w2, w3 = philox_words(tl.load(counters + i), c1, c2, key0, key1)
    for_each = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [N, 2, 2] in order 0 1 2 3
    tl.store(out + 4 * i[:, None] + tl.arange(0, 4)[None], tl.reshape(for_each, (N, 4)).to(tl.int64))


@pytest.mark.parametrize("key", [(0, 0), (1, 1), (7, 3), (2**31, 2**32 - 1)])
@pytest.mark.parametrize(("c1", "c2"), [(0, 0), (1, 1), (5, 2**32 - 1)])
def test_equal_bits(interpreted, key, c1, c2):
    counters = torch.tensor([0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 1, 12345])
    out = torch.empty(8, 4, dtype=torch.int64)
    _draw[(1,)](counters, out, c1, c2, *key, 8)
    zero = np.zeros(8, dtype=np.uint64)
    words = philox(counters.numpy().astype(np.uint64), zero + np.uint64(c1), zero + np.uint64(c2), zero, key)
    assert np.array_equal(out.numpy().astype(np.uint64), np.stack(words, 1))
