"""Benchmark records: one line per sitting in a .jsonl file that only grows, for ``fastlth report --bench``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlth import running
from fastlth.composition import compose

ROUNDS = 3


def append(document: Mapping[str, Any], file: Path) -> None:
    """Add ``document`` and what a short search reaches now to ``file``: speed means nothing beside worse tickets."""
    line = json.dumps({**document, "accuracy": accuracy()}, allow_nan=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(line + "\n")


def accuracy() -> dict[str, float]:
    """Test accuracy at the end of the first and the last round of a search of a few seconds (LeNet-300-100, digits)."""
    recipe = compose("lenet-300-100", "digits", settings={"prune.rounds": ROUNDS, "compute.device": "cpu"}).recipe
    with tempfile.TemporaryDirectory(prefix="fastlth-") as folder:
        rounds = running.run(recipe, out=folder).rounds
    return {f"lenet-300-100 digits round {k}": rounds[k]["test_accuracy"] for k in (0, ROUNDS)}
