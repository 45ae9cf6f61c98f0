"""Pruning by magnitude on the device removes the weights that the search's own selection removes, tie by tie."""

import numpy as np
import pytest
import torch
from fastlth_kernels import kth_magnitude as km
from fastlth_kernels.bitmask import pack, unpack
from fastlth_kernels.launch import jit, tl
from fastlth_kernels.philox import philox
from hypothesis import given, settings

from tests.kernels.cases import SELECTION, check_selection

WEIGHT = torch.tensor([[0.5, -0.25, 0.0, -0.0, 1e-45, 0.25]])
ALL = torch.ones(1, 6, dtype=torch.bool)


@settings(deadline=None, max_examples=8)
@given(SELECTION)
def test_random_selections(case):
    pytest.importorskip("triton")
    from tests.kernels.interpreter import interpreter

    with interpreter():
        check_selection(case)


@pytest.mark.parametrize("values", ["normal", "few", "denormal", "equal", "extreme"])
def test_values(interpreted, values):
    check_selection({"shapes": [(20, 65), (2, 3, 3, 33)], "density": 0.5, "seed": 5, "values": values, "share": 0.4,
                     "round": 3, "key": (2**32 - 1, 1), "first": 1})  # fmt: skip


def test_keys_that_begin_alike(interpreted):
    """Weights 913 and 2035 have an equal first word, the 1540th lowest, under this key: the second decides."""
    check_selection({"shapes": [(64, 32)], "density": 1.1, "seed": 5, "values": "equal", "share": 1540 / 2048,
                     "round": 1, "key": (2852, 0), "first": 1})  # fmt: skip


@jit
def _keys(out, width, spatial, number, round, key0, key1, N: tl.constexpr):
    index = tl.arange(0, N)
    w0, w1 = km._key_words(index, width, spatial, number, round, key0, key1)
    tl.store(out + 2 * index, w0)
    tl.store(out + 2 * index + 1, w1)


@pytest.mark.parametrize("shape", [(64,), (4, 16), (4, 2, 2, 4)])
@pytest.mark.parametrize("key", [(2852, 0), (2**32 - 1, 2**31)])
def test_the_key_has_all_its_63_bits(interpreted, shape, key):
    """Keys of a selection hardly ever agree in more than their first 40 bits, so no selection shows the last ones."""
    weight, out = torch.zeros(shape), torch.empty(64, 2, dtype=torch.int64)
    _keys[(1,)](out, shape[-1], km._spatial(weight), 5, 9, *km.signed(key), 64)
    counter = np.arange(64).reshape(shape)
    if len(shape) == 4:  # memory holds OHWI, the counter is the place in OIHW
        o, h, w, i = shape
        counter = np.arange(64).reshape(o, i, h, w).transpose(0, 2, 3, 1)
    counter, zero = counter.reshape(-1).astype(np.uint64), np.zeros(64, dtype=np.uint64)
    w0, w1, _, _ = philox(counter, zero + np.uint64(5), zero + np.uint64(9), zero, key)
    assert out[:, 0].tolist() == [int(w) for w in w0]
    assert out[:, 1].tolist() == [int(w) // 2 for w in w1]


def test_order():
    """0.0 and -0.0 are equal, a denormal is above them, the sign does not count."""
    expected = [0.0, 0.0, 1e-45, 0.25, 0.25, 0.5]
    found = [float(km.kth_magnitude([WEIGHT], [pack(ALL)], k)) for k in range(1, 7)]
    assert torch.equal(torch.tensor(found).view(torch.int32), torch.tensor(expected).view(torch.int32))


@pytest.mark.parametrize("kernel", [False, True])
def test_refusals(interpreted, kernel):
    def prune(weight, count):
        words = [pack(ALL)]
        if kernel:
            km._launch([weight], words, count, [0], 1, (1, 2), None, remove=True)
        else:
            km.prune_lowest([weight], words, count, [0], 1, (1, 2))

    for nan in (float("nan"), -float("nan")):
        with pytest.raises(ValueError, match="1 of 6 kept weights are NaN"):
            prune(torch.where(WEIGHT == 0.5, nan, WEIGHT), 1)
    smallest_nan = WEIGHT.clone()
    smallest_nan.view(torch.int32)[0, 2] = 0x7F800001
    with pytest.raises(ValueError, match="NaN"):
        prune(smallest_nan, 1)
    for count in (0, 7, -1):
        with pytest.raises(ValueError, match=f"the {count} lowest of 6"):
            prune(WEIGHT, count)


def test_wrong_tensors_are_refused():
    for weights, words in (
        ([WEIGHT.double()], [pack(ALL)]), ([WEIGHT], [pack(ALL).long()]), ([WEIGHT], []), ([], []),
        ([WEIGHT], [torch.zeros(1, 2, dtype=torch.int32)]),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            km.kth_magnitude(weights, words, 1)


def test_opcheck_and_one_graph():
    weights, words = [torch.randn(4, 33), torch.randn(2, 3, 3, 5)], [torch.full((4, 2), 3, dtype=torch.int32)]
    words.append(torch.full((2, 3, 3, 1), 31, dtype=torch.int32))
    torch.library.opcheck(km.kth_magnitude, (weights, words, 3))
    torch.library.opcheck(km.prune_lowest, (weights, [b.clone() for b in words], 3, [0, 1], 2, (1, 2)))
    mine = [b.clone() for b in words]
    prune = torch.compile(km.prune_lowest, fullgraph=True, backend="aot_eager")
    prune(weights, mine, 9, [0, 1], 2, (1, 2))
    assert sum(int(unpack(b, w.shape[-1]).sum()) for w, b in zip(weights, mine, strict=True)) == 12 + 90 - 9
    found = torch.compile(km.kth_magnitude, fullgraph=True, backend="aot_eager")
    assert torch.equal(found(weights, words, 9), km.kth_magnitude(weights, words, 9))
