"""Masks as bits: numpy.packbits is the judge."""

import pytest
import torch
from fastlth_kernels.bitmask import pack, unpack, words_shape
from hypothesis import given, settings

from tests.kernels.cases import DENSITY, SEED, SHAPE, check_bits


@settings(deadline=None, max_examples=50)
@given(SHAPE, DENSITY, SEED)
def test_equals_packbits_and_comes_back(shape, density, seed):
    check_bits(shape, density, seed)


def test_empty():
    assert pack(torch.empty(0, 5, dtype=torch.bool)).shape == (0, 1)
    assert unpack(torch.empty(3, 0, dtype=torch.int32), 0).shape == (3, 0)


def test_bits_beyond_the_row_are_not_read():
    words = torch.full((2, 2), -1, dtype=torch.int32)
    assert unpack(words, 40).shape == (2, 40) and bool(unpack(words, 40).all())


def test_refusals():
    with pytest.raises(TypeError, match="bool"):
        pack(torch.ones(3))
    with pytest.raises(ValueError, match="need 2"):
        unpack(torch.zeros(4, 3, dtype=torch.int32), 64)
    assert words_shape((4, 3, 65)) == (4, 3, 3)
