"""JSON with exactly one spelling, so that every byte of it matters.

Canonical: ASCII (all else as \\uXXXX), keys sorted by code point, no white space, no NaN or Infinity.
Reading accepts nothing else; a repeated key, a stray blank and ``1.0e0`` for ``1.0`` all differ from
the canonical spelling of what they mean, and that is how they are found.
"""

from __future__ import annotations

import json
from typing import Any


def dumps(value: Any) -> str:
    """The canonical text of plain values. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def loads(text: str) -> Any:
    """The inverse of ``dumps``. Raises ValueError for every other text, however deep or long."""
    try:
        value = json.loads(text)
        canonical = dumps(value)
    except (RecursionError, MemoryError):
        raise ValueError("JSON is nested too deeply or too large") from None
    if canonical != text:
        raise ValueError("JSON is not in canonical form (a key twice, white space or another spelling)")
    return value
