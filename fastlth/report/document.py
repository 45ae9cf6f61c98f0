"""A report before it is HTML or markdown: sections of figures, tables and commands."""

from __future__ import annotations

from dataclasses import dataclass

from fastlth.report.figure import Curves, Figure, Matrices


@dataclass(frozen=True)
class Table:
    """Texts, as a person reads them."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: int | None = None
    """a row that stands out"""


@dataclass(frozen=True)
class Code:
    """Lines to be pasted into a shell."""

    title: str
    lines: tuple[str, ...]


Item = Figure | Table | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    items: tuple[Item, ...]
    note: str = ""


@dataclass(frozen=True)
class Document:
    """A report before it is written as a page or as markdown."""

    title: str
    lead: tuple[str, ...]
    """what one should know first, a sentence each"""
    sections: tuple[Section, ...]

    @property
    def figures(self) -> list[Figure]:
        """All figures of all sections, in order."""
        return [item for s in self.sections for item in s.items if isinstance(item, Curves | Matrices)]
