"""The kernels on ten thousand random small cases each, in Triton's interpreter: forty minutes of one core."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings

pytest.importorskip("triton")

from tests.kernels import cases
from tests.kernels.interpreter import interpreter

pytestmark = pytest.mark.endurance

MANY = settings(deadline=None, max_examples=10_000, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    with interpreter():
        yield


@MANY
@given(cases.SHAPE, cases.DENSITY, cases.SEED)
def test_bits(shape, density, seed):
    cases.check_bits(shape, density, seed)


@MANY
@given(cases.STEP)
def test_step(case):
    cases.check_step(case)


@MANY
@given(cases.SELECTION)
def test_selection(case):
    cases.check_selection(case)


@MANY
@given(cases.BATCH)
def test_batch(case):
    cases.check_batch(case)
