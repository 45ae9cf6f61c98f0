"""The papers' values for a model and data set, and where each stands."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Published:
    """A value relative to the paper's own dense net."""

    quantity: str
    """a field of a round's result"""
    density: float
    gain: float | None
    """accuracy above the dense net's, as a fraction"""
    earlier: float | None
    """the dense net's early-stop iteration divided by this one's"""
    says: str
    source: str

    def beside(self, dense: float) -> float:
        """Where it lies for somebody whose dense net has the value ``dense``."""
        return dense + self.gain if self.gain is not None else dense / (self.earlier or 1.0)


def values(model: str, dataset: str) -> list[Published]:
    """What papers state for a pair; often nothing."""
    table = _table()
    return [
        Published(v["quantity"], v["density"], v.get("gain"), v.get("earlier"), v["says"],
                  f"{table[v['from']]['source']}, {v['place']}")
        for v in table.get(f"{model} {dataset}", {}).get("values", [])
    ]  # fmt: skip


@cache
def _table() -> dict[str, Any]:
    text = (resources.files("fastlth") / "report" / "published.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
