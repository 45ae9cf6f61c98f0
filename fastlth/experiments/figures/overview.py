"""One line per figure: what it is, how many trainings it takes at the paper's scale, what it waits for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastlth.experiments.figures.catalogue import FIGURES
from fastlth.experiments.figures.declare import Figure
from fastlth.experiments.figures.scale import jobs
from fastlth.experiments.figures.work import trainings


@dataclass(frozen=True)
class Row:
    """A line of ``fastlth reproduce --list``."""

    name: str
    what: str
    source: str
    trainings: int | None
    """at the paper's scale, of what can be trained; None: nothing can"""
    needs: tuple[str, ...]
    """what is missing for the whole figure, or for parts of it"""

    @property
    def remark(self) -> str:
        """What cannot be trained yet, or nothing."""
        if not self.needs:
            return ""
        needs = " and ".join(self.needs)
        return f"needs {needs}" if self.trainings is None else f"without what needs {needs}"

    def to_json(self) -> dict[str, Any]:
        """The row of ``reproduce --list --json``."""
        return {**asdict(self), "needs": list(self.needs)}


def overview(figures: Iterable[Figure] = tuple(FIGURES.values())) -> list[Row]:
    """All figures, in their order."""
    nowhere = Path("runs-that-are-not-there")  # all trainings count, whatever is done
    return [
        Row(f.name, f.what, f.source, len(trainings(jobs(f, "paper"), nowhere)) if f.ready else None, f.needs)
        for f in figures
    ]
