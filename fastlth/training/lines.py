"""The sparse engine's threads and break-even, from a few measured steps.

A step of dense layers always takes the same time; one from kept weights alone takes the longer the more there are, a
little more than in proportion where they leave the caches. Several threads share the work and wait for each other: one
thread alone is faster where there is little of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

DENSITIES = (0.2, 0.5, 0.8)
"""where the lines are measured"""


@dataclass(frozen=True)
class Line:
    """Seconds per step with one number of threads: all layers dense, and from kept weights at each of DENSITIES."""

    dense: float
    kept: tuple[float, ...]

    @classmethod
    def of(cls, dense: Mapping[float, float], kept: Mapping[float, float]) -> Line:
        """From the seconds at each of DENSITIES; those of dense layers differ by chance alone."""
        return cls(statistics.fmean(dense.values()), tuple(kept[d] for d in DENSITIES))

    def seconds(self, density: float) -> float:
        """What a step takes, in the faster of the two ways."""
        return min(self.dense, self._kept(density))

    @property
    def break_even(self) -> float:
        """The density in [0, 1) at and below which kept weights alone cost no more than all of them."""
        return min(_highest(lambda d: self._kept(d) <= self.dense), 0.99)  # a layer that keeps all of them is dense

    def _kept(self, density: float) -> float:
        """Straight between the measured densities, and on beyond them."""
        i = 0 if density < DENSITIES[1] else 1
        slope = (self.kept[i + 1] - self.kept[i]) / (DENSITIES[i + 1] - DENSITIES[i])
        return self.kept[i] + (density - DENSITIES[i]) * slope


def one_thread(alone: Line, several: Line) -> float:
    """The density at and below which one thread takes no longer than several; 1 where it never does, 0 where always."""
    return _highest(lambda d: alone.seconds(d) <= several.seconds(d))


def _highest(holds: Callable[[float], bool]) -> float:
    """The highest density, in hundredths, at and below which ``holds``."""
    fails = (d for d in range(1, 101) if not holds(d / 100))
    return (next(fails, 101) - 1) / 100
