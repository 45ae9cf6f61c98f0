"""``interpreted``: a test that asks for it has its kernels run by Triton's interpreter, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def interpreted() -> Iterator[None]:
    from tests.kernels.interpreter import interpreter

    with interpreter():
        yield
