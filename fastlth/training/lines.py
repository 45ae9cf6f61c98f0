"""The sparse engine's threads and break-even, from a few measured steps.

A step from kept weights alone takes time that is linear in the density; a step of dense layers always takes the same.
Several threads share the work and wait for each other: one thread alone is faster where there is little work.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

DENSITIES = (0.5, 0.2)
"""where the lines are measured"""


@dataclass(frozen=True)
class Line:
    """Seconds per step with one number of threads: all layers dense, and from kept weights at each of DENSITIES."""

    dense: float
    kept: tuple[float, float]

    @classmethod
    def of(cls, dense: Mapping[float, float], kept: Mapping[float, float]) -> Line:
        """From the seconds at each of DENSITIES; those of dense layers differ by chance alone."""
        return cls(statistics.fmean(dense.values()), (kept[DENSITIES[0]], kept[DENSITIES[1]]))

    def seconds(self, density: float) -> float:
        """What a step takes, in the faster of the two ways."""
        return min(self.dense, self.kept[0] + (density - DENSITIES[0]) * self._slope)

    @property
    def break_even(self) -> float:
        """The density at which kept weights alone cost as much as all of them, in [0, 1]."""
        crossing = DENSITIES[0] + (self.dense - self.kept[0]) / self._slope if self._slope > 0 else 1.0
        return round(min(max(crossing, 0.0), 1.0), 2)

    @property
    def _slope(self) -> float:
        return (self.kept[0] - self.kept[1]) / (DENSITIES[0] - DENSITIES[1])


def one_thread(alone: Line, several: Line) -> float:
    """The density at and below which one thread takes no longer than several; 1 where it never does, 0 where always."""
    slower = (d for d in range(1, 101) if alone.seconds(d / 100) > several.seconds(d / 100))
    return (next(slower, 101) - 1) / 100
