"""How soon the command answers: whole processes, ``--help`` against the import of torch alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from fastlth.bench.paired import paired
from fastlth.bench.subject import Row


def rows(*, seconds: float = 8.0) -> Iterator[Row]:
    """One row; ``seconds`` here are of a process, and images/s are not a figure it has."""

    def process(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ours(count: int) -> None:
        for _ in range(count):
            process("-m", "fastlth", "--help")

    def theirs(count: int) -> None:
        for _ in range(count):
            process("-c", "import torch")

    result = paired(ours, theirs, budget=seconds)
    yield {
        "subject": "startup", "model": None, "dataset": None, "path": "fastlth --help", "density": None,
        "images_per_second": None, "seconds": result.seconds_a, "against": "import torch",
        "against_seconds": result.seconds_b, "ratio": result.ratio, "ratio_low": result.low,
        "ratio_high": result.high, "control": [result.control_low, result.control_high], "n": result.pairs,
    }  # fmt: skip
