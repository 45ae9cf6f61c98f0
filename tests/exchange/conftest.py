from __future__ import annotations

from pathlib import Path

import pytest

from tests.exchange.making import CONV, LENET, make_ticket
from tests.helpers import small_recipe


@pytest.fixture(params=[LENET, CONV], ids=["lenet", "conv-2 with batch norm"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A search.ticket of four rounds; round 2 is its winning ticket."""
    path = tmp_path / "search.ticket"
    make_ticket(path, small_recipe(**request.param))
    return path
