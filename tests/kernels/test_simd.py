"""The vector vocabulary, word by word, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from fastlth_kernels import shuffles, simd
from fastlth_kernels.shuffles import DOTS
from fastlth_kernels.threads import FLUSH, flush_denormals
from numba import njit


def aligned(values, dtype):
    raw = np.zeros(len(values) * np.dtype(dtype).itemsize + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    array = raw[begin:][: len(values) * np.dtype(dtype).itemsize].view(dtype)
    array[:] = values
    return array


@njit
def words_on(memory, bits):
    """Row i of 64 numbers: the i-th word applied to rows 0, 1, 2."""
    x, y, z = simd.load(memory, 0), simd.load(memory, 64), simd.load(memory, 128)
    simd.store(memory, 192, x + y)
    simd.store(memory, 256, x - y)
    simd.store(memory, 320, x * y)
    simd.store(memory, 384, x / y)
    simd.store(memory, 448, simd.fma(x, y, z))
    simd.store(memory, 512, simd.fma(simd.at(memory, 5), y, z))
    simd.store(memory, 576, simd.larger(x, y))
    simd.store(memory, 640, simd.gate(x, y))
    simd.store(memory, 704, simd.first(x, 37))
    simd.store(memory, 768, simd.where(bits, x))
    simd.store(memory, 832, simd.splat(simd.total(x)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_words(dtype):
    rng = np.random.default_rng(0)
    x, y, z = (rng.normal(size=64).astype(dtype) for _ in range(3))
    x[3], y[4], x[5], z[6], y[7], x[8] = np.nan, np.nan, np.inf, -0.0, 0.0, -np.inf
    bits = rng.random(64) < 0.5
    memory = aligned(np.concatenate([x, y, z, np.zeros(64 * 11)]), dtype)
    packed = int(np.packbits(bits, bitorder="little").view("<i8")[0])
    words_on(memory, packed)
    close = {np.float32: 1e-6, np.float64: 1e-14}[dtype]
    got = memory.reshape(-1, 64)[3:]
    with np.errstate(all="ignore"):
        expected = [
            x + y, x - y, x * y, x / y, x * y + z, x[5] * y + z, np.where(y > x, y, x), np.where(y > 0, x, 0),
            np.where(np.arange(64) < 37, x, 0), np.where(bits, x, 0), np.full(64, x.sum()),
        ]  # fmt: skip
    for i, want in enumerate(expected):
        np.testing.assert_allclose(got[i], want, rtol=close, atol=close, err_msg=str(i))


@njit
def pieces_on(memory):
    """Four quarters of row 0, each with row 1's, to row 2: as many lanes as the quarter has."""
    x = simd.load(memory, 0)
    parts = (simd.quarter(x, 0), simd.quarter(x, 1), simd.quarter(x, 2), simd.quarter(x, 3))
    for i, part in enumerate(parts):
        q = 16 * i
        other = simd.load_like(memory, 64 + q, part)
        scaled = simd.times(simd.at(memory, 5), part) + simd.splat_like(simd.at(memory, 6), part)
        simd.store(memory, 128 + q, simd.fma(simd.at(memory, 7), other, scaled))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_quarter_of_the_lanes(dtype):
    x, y = np.random.default_rng(3).normal(size=(2, 64)).astype(dtype)
    memory = aligned(np.concatenate([x, y, np.zeros(64)]), dtype)
    pieces_on(memory)
    np.testing.assert_allclose(memory[128:], x[7] * y + (x[5] * x + x[6]), rtol=1e-5, atol=1e-6)
    assert (memory[:128] == np.concatenate([x, y])).all()


def test_the_sum_of_the_lanes():
    memory = aligned(np.concatenate([np.arange(64), np.ones(64), np.ones(64 * 12)]), np.float64)
    words_on(memory, 0)
    assert (memory[832:896] == 63 * 32).all()


@njit
def functions_on(memory):
    x = simd.load(memory, 0)
    simd.store(memory, 64, simd.rsqrt(x))
    simd.store(memory, 128, simd.reciprocal(x))
    simd.store(memory, 192, simd.exp(simd.splat(memory.dtype.type(0)) - x))


@pytest.mark.parametrize(("dtype", "digits"), [(np.float32, 2.0**-21), (np.float64, 2.0**-50)])
def test_functions(dtype, digits):
    rng = np.random.default_rng(1)
    for scale in (1e-25, 1e-6, 1.0, 80.0, 1e25):
        x = (rng.random(64) * scale + scale / 100).astype(dtype)
        memory = aligned(np.concatenate([x, np.zeros(192)]), dtype)
        functions_on(memory)
        roots, inverses, powers = memory.reshape(4, 64)[1:].astype(np.float64)
        wide = x.astype(np.float64)
        np.testing.assert_allclose(roots, 1 / np.sqrt(wide), rtol=digits)
        np.testing.assert_allclose(inverses, 1 / wide, rtol=digits)
        np.testing.assert_allclose(powers, np.exp(-wide), rtol=4 * digits if scale < 80 else 1e-3, atol=1e-37)
    memory = aligned(np.concatenate([[0.0], np.full(63, np.nan), np.zeros(192)]), dtype)
    functions_on(memory)
    assert memory[192] == 1
    assert np.isnan(memory[193:]).all()


@njit
def dots(memory, indices, count, add):
    d = simd.load(memory, 0)
    if count == DOTS:
        shuffles.store_dots(memory, 64 + 3, d, 128, 64, indices, 2, DOTS, add)
    elif count == 8:
        shuffles.store_dots(memory, 64 + 3, d, 128, 64, indices, 2, 8, add)
    else:
        shuffles.store_dots(memory, 64 + 3, d, 128, 64, indices, 2, 4, add)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", sorted({4, 8, DOTS}))
@pytest.mark.parametrize("add", [False, True])
def test_dots(count, add, dtype):
    rng = np.random.default_rng(2)
    memory = aligned(rng.normal(size=64 * 12), dtype)
    indices = rng.integers(0, 10, 20).astype(np.int32)
    before = memory.copy()
    dots(memory, indices, count, add)
    rows = before.reshape(12, 64)
    expected = before.copy()
    expected[67 : 67 + count] = rows[2:][indices[2 : 2 + count]] @ rows[0] + (before[67 : 67 + count] if add else 0)
    close = 1e-5 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(memory, expected, rtol=close, atol=close)


@njit
def turn(memory, pixels, places, ranks):
    real = memory.dtype.type
    shuffles.store_pixels(memory, 0, 64, pixels, 1, places, 2, ranks, real(0.5), real(-3))
    shuffles.transpose16(memory, 1024, 16, 1280, 32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_transposes(dtype):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, 5000, dtype=np.uint8)
    places = rng.integers(0, 4900, 66)
    memory = aligned(rng.normal(size=2048), dtype)
    before, ranks = memory.copy(), np.append(-1, rng.permutation(16))
    turn(memory, pixels, places, ranks)
    for f in range(16):
        assert (memory[64 * ranks[1 + f] :][:64] == pixels[1 + places[2:] + f] * 0.5 - 3).all()
    turned = memory[1280:].reshape(-1, 32)[:16, :16]
    assert (turned == before[1024:1280].reshape(16, 16).T).all()


@njit
def lit(memory):
    return simd.nonzero(simd.load(memory, 0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lanes_that_are_not_zero(dtype):
    values = np.random.default_rng(4).integers(0, 2, 64) * 0.1
    values[3:7] = -0.0, np.nan, np.inf, -1e-30
    found = lit(aligned(values, dtype))
    assert [found >> i & 1 for i in range(64)] == (values != 0).tolist()


@njit
def set_flushing(value):
    return flush_denormals(value)


def test_denormals_are_flushed_and_come_back():
    smallest = float(np.finfo(np.float64).tiny)
    before = set_flushing(FLUSH)
    flushed = smallest * 0.5
    assert set_flushing(before) & FLUSH == FLUSH
    assert flushed == 0.0
    assert smallest * 0.5 > 0.0
