"""What a step of the sparse engine takes at any density, from a few measured ones.

A step of dense layers always takes the same time; one from kept weights alone takes the longer the more there are, a
little more than in proportion where they leave the caches.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
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
        """The density, in hundredths, at and below which kept weights alone cost no more than all of them.

        Below 1: a layer that keeps all its weights is dense.
        """
        dearer = (d for d in range(1, 100) if self._kept(d / 100) > self.dense)
        return (next(dearer, 100) - 1) / 100

    def _kept(self, density: float) -> float:
        """Straight between the measured densities, and on beyond them."""
        i = 0 if density < DENSITIES[1] else 1
        slope = (self.kept[i + 1] - self.kept[i]) / (DENSITIES[i + 1] - DENSITIES[i])
        return self.kept[i] + (density - DENSITIES[i]) * slope
