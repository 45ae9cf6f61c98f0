"""Byte planes: every bit comes back, sizes meet the entropy bound, lies are refused."""

from __future__ import annotations

import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fastlth.store import codec
from fastlth.store.container import DTYPES


def roundtrip(array: NDArray[Any]) -> NDArray[Any]:
    data, info = codec.encode(array)
    return codec.decode(np.frombuffer(data, np.uint8), info)


def assert_same_bits(a: NDArray[Any], b: NDArray[Any]) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_array_comes_back_bit_for_bit(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7))
    count = int(np.prod(shape)) * DTYPES[dtype].itemsize
    raw = np.frombuffer(data.draw(st.binary(min_size=count, max_size=count)), np.uint8)
    if dtype == "BOOL":
        raw = raw % 2
    array = raw.view(DTYPES[dtype]).reshape(shape)
    assert_same_bits(roundtrip(array), array)


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7F800001, 0xFFFFFFFF, 0x80000000, 0x00000001, 0xFF800000])
def test_nan_payloads_minus_zero_and_denormals_keep_their_bits(bits: int) -> None:
    array = np.full(5000, bits, np.uint32).view(np.float32)
    assert (roundtrip(array).view(np.uint32) == bits).all()


def test_layout_and_byte_order_do_not_matter() -> None:
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    for same in (array.transpose(2, 0, 1).transpose(1, 2, 0), np.asfortranarray(array), array.astype(">f4")):
        assert codec.encode(same) == codec.encode(array)
    assert_same_bits(roundtrip(array[::2, ::-1]), np.ascontiguousarray(array[::2, ::-1]))


def test_float_planes_are_coded_only_where_it_pays() -> None:
    array = np.random.default_rng(0).standard_normal(200_000, dtype=np.float32)
    data, info = codec.encode(array)
    assert [kind for kind, _ in info["planes"]] == ["raw", "raw", "raw", "huffman"]
    assert len(data) < 0.86 * array.nbytes  # noise 3 bytes, exponent and sign 0.43
    assert info["planes"][3][1] < 1.03 * entropy_bytes(array.view(np.uint8)[3::4])


def test_pruned_at_comes_within_two_percent_of_its_entropy() -> None:
    rng = np.random.default_rng(0)
    count = 400_000
    pruned_at = np.zeros(count, np.uint8)
    alive = np.arange(count)
    for round in range(1, 22):
        alive = rng.permutation(alive)
        pruned_at[alive[: len(alive) // 5]] = round
        alive = alive[len(alive) // 5 :]
    data, info = codec.encode(pruned_at)
    assert info["planes"] == [["huffman", len(data)]]
    assert len(data) < 1.02 * entropy_bytes(pruned_at)


def test_noise_is_stored_as_it_is() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    data, info = codec.encode(noise)
    assert info["planes"] == [["raw", noise.size]]
    assert data == noise.tobytes()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [65]), ("shape", [63]), ("shape", [64, 0]), ("shape", [1 << 40]), ("shape", [-64]), ("shape", "64"),
        ("shape", [True] * 2), ("shape", [1 << 30, 1 << 30]), ("shape", [1] * 40), ("shape", [64.0]),
        ("dtype", "F64"), ("dtype", "BF16"), ("dtype", ["F32"]), ("sha256", "0" * 64),
        ("planes", []), ("planes", [["raw", 64]] * 3), ("planes", [["raw", 64]] * 3 + [["raw", 63]]),
        ("planes", [["raw", 64], ["raw", 64], ["raw", 192], ["raw", -64]]), ("planes", [["lzma", 64]] * 4),
        ("planes", [["huffman", 64]] * 4), ("planes", [["raw", 64.0]] * 4),
    ],
)  # fmt: skip
def test_a_description_that_does_not_fit_is_refused(key: str, value: Any) -> None:
    data, info = codec.encode(np.random.default_rng(0).integers(0, 2**31, 64, dtype=np.int32).view(np.float32))
    assert info["planes"] == [["raw", 64]] * 4
    with pytest.raises(ValueError):
        codec.decode(np.frombuffer(data, np.uint8), {**info, key: value})


def test_a_stream_that_is_longer_or_shorter_than_declared_is_refused() -> None:
    zeros = np.zeros(1000, np.uint8)
    data, info = codec.encode(zeros)
    assert info["planes"][0][0] == "huffman"
    longer, shorter = (zlib.compress(bytes(n), 0) for n in (1001, 999))
    for broken in (data[:-1], data + b"\0", data + data, data[:126], longer, shorter):
        lie = {**info, "planes": [["huffman", len(broken)]]}
        with pytest.raises(ValueError):
            codec.decode(np.frombuffer(broken, np.uint8), lie)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zlib.compress(bytes(1 << 26), 9)
    info = {**codec.describe(np.zeros(1 << 26, np.uint8)), "planes": [["huffman", len(bomb)]]}
    tracemalloc.start()
    with pytest.raises(ValueError, match="more data than it can hold"):
        codec.decode(np.frombuffer(bomb, np.uint8), info)
    info["shape"] = [8 * len(bomb)]  # as much as may be; the stream holds more
    with pytest.raises(ValueError, match="longer or shorter"):
        codec.decode(np.frombuffer(bomb, np.uint8), info)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_one_byte_does_not_stand_for_many() -> None:
    info = {**codec.describe(np.full(8, 7, np.uint8)), "planes": [["raw", 1]]}
    with pytest.raises(ValueError, match="longer or shorter"):
        codec.decode(np.full(1, 7, np.uint8), info)


def test_dtypes_that_cannot_be_stored_are_named() -> None:
    with pytest.raises(ValueError, match="complex64 cannot be stored; use one of: F64"):
        codec.encode(np.zeros(2, np.complex64))


def entropy_bytes(data: NDArray[np.uint8]) -> float:
    share = np.bincount(data, minlength=256) / data.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum() * data.size / 8)
