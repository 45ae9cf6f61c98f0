"""A picture as plain numbers. What is drawn, written as CSV and printed in the page is the same object.

Accuracies, densities and shares are fractions here and in CSV; an axis says that people read them as per cent.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Cell = str | float | int | None


@dataclass(frozen=True)
class Axis:
    """What an axis shows, and how it is scaled and labelled."""

    label: str
    """what a person reads"""
    column: str
    """the name in CSV files"""
    percent: bool = False
    log: bool = False
    inverted: bool = False
    whole: bool = False
    """values are counts"""
    ticks: tuple[float, ...] = ()
    """where labels stand; chosen by the drawing where empty"""
    names: tuple[str, ...] = ()
    """what stands at the ticks instead of numbers"""
    low: float | None = None
    """lower limit, where showing everything would hide what matters"""
    zero: bool = False
    """starts at 0"""

    def text(self, value: float) -> str:
        """A value as a person reads it."""
        if self.percent:
            return f"{100 * value:.2f} %"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Look:
    """How a series differs from its neighbours: each number picks from a list in draw.py."""

    colour: int = 0
    dash: int = 0
    marker: int | None = 0
    line: bool = True
    thin: bool = False
    ring: bool = False
    """an open circle around a point of another series"""
    bars: bool = False
    """intervals as error bars instead of a band"""
    depth: float | None = None
    """0 to 1: a colour of a sequence instead, for many lines with an order"""


@dataclass(frozen=True)
class Point:
    """One value; with several replicates the mean of ``count``, and ``low`` and ``high`` are the extremes."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    count: int = 1


@dataclass(frozen=True)
class Series:
    """A line of points with its name and look; ``legend`` False: it is explained elsewhere."""

    label: str
    points: tuple[Point, ...]
    look: Look = field(default_factory=Look)
    legend: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes with its lines."""

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Curves:
    """Lines over two axes, in one or more panels."""

    name: str
    """of its files"""
    title: str
    caption: str
    x: Axis
    y: Axis
    panels: tuple[Panel, ...]

    @property
    def empty(self) -> bool:
        """Whether no line has a point."""
        return not any(s.points for p in self.panels for s in p.series)

    @property
    def header(self) -> tuple[str, ...]:
        """The columns of the CSV file."""
        return ("panel", "series", self.x.column, self.y.column, "low", "high", "replicates")

    def rows(self) -> Iterable[tuple[Cell, ...]]:
        """What the CSV file holds, exactly."""
        for panel in self.panels:
            for s in panel.series:
                for p in s.points:
                    yield (panel.title, s.label, p.x, p.y, p.low, p.high, p.count)

    def texts(self) -> Iterable[tuple[str, ...]]:
        """The same rows as a person reads them."""
        for panel, series, x, y, low, high, count in self.rows():
            assert isinstance(x, float) and isinstance(y, float)
            ends = ["" if not isinstance(v, float) else self.y.text(v) for v in (low, high)]
            yield (str(panel), str(series), self.x.text(x), self.y.text(y), *ends, str(count))


@dataclass(frozen=True)
class Square:
    """One panel of ``Matrices``: a value in 0 to 1 for each pair of labels."""

    title: str
    labels: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Matrices:
    """Squares of shares, each cell coloured by its value."""

    name: str
    title: str
    caption: str
    label: str
    """of both axes"""
    column: str
    panels: tuple[Square, ...]

    @property
    def empty(self) -> bool:
        """Whether no panel has a label."""
        return not any(p.labels for p in self.panels)

    @property
    def header(self) -> tuple[str, ...]:
        """The columns of the CSV file."""
        return ("panel", f"{self.label} a", f"{self.label} b", self.column)

    def rows(self) -> Iterable[tuple[Cell, ...]]:
        """What the CSV file holds, exactly."""
        for panel in self.panels:
            for a, line in zip(panel.labels, panel.values, strict=True):
                for b, value in zip(panel.labels, line, strict=True):
                    yield (panel.title, a, b, value)

    def texts(self) -> Iterable[tuple[str, ...]]:
        """The same rows as a person reads them."""
        for panel, a, b, value in self.rows():
            assert isinstance(value, float)
            yield (str(panel), str(a), str(b), f"{100 * value:.2f} %")


Figure = Curves | Matrices


def summarise(x: float, values: Sequence[float | None]) -> Point | None:
    """Mean, smallest and largest of the values that were measured; None where none was."""
    found = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not found:
        return None
    mean = math.fsum(found) / len(found)
    if len(found) == 1:
        return Point(float(x), mean)
    return Point(float(x), mean, min(found), max(found), len(found))


def to_csv(figure: Figure) -> str:
    """The figure's numbers with all their digits; what was not measured is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(figure.header)
    writer.writerows(figure.rows())
    return text.getvalue()
