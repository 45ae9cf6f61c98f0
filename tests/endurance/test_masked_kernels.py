"""Masked linear and convolution kernels on many random small problems, in Triton's interpreter, against float64."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from tests.kernels.interpreter import interpreter
from tests.kernels.masked_problems import Conv, Linear

pytestmark = pytest.mark.endurance

SEED = st.integers(0, 2**32 - 1)
DENSITY = st.sampled_from([0.0, 0.02, 0.5, 1.0])
TYPES = st.sampled_from([
    (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
])  # fmt: skip
ROW = st.sampled_from([1, 2, 15, 31, 32, 33, 64, 65, 70])  # around the words of a mask


def many(examples: int) -> settings:
    return settings(deadline=None, max_examples=examples, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    with interpreter():
        yield


@many(1_000)
@given(st.tuples(st.integers(1, 3), st.integers(1, 40), ROW, ROW), TYPES, DENSITY, st.booleans(), st.booleans(), SEED)
def test_linear(sizes, types, density, bias, relu, seed):
    Linear(sizes, *types, density, bias, relu, seed).judge_launchers()


@many(100)
@given(
    st.tuples(st.integers(1, 2), ROW, st.integers(1, 6), st.integers(1, 6), ROW),
    st.sampled_from([(3, 1), (1, 0)]), st.integers(1, 2), TYPES, DENSITY, st.booleans(), st.integers(1, 4), SEED,
)  # fmt: skip
def test_conv(sizes, taps_and_padding, stride, types, density, bias, parts, seed):
    taps, padding = taps_and_padding
    Conv(sizes, taps, stride, padding, *types, density, bias, seed).judge_launchers(parts=parts)
