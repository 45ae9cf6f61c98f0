"""What happens while searches run: what ``show`` gets, beside the events of ``search.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastlth.recipe import ComputeSection, Recipe
from fastlth.search import Event


@dataclass(frozen=True)
class Started:
    """A search begins or goes on: what ``show`` gets before the first event."""

    path: Path
    recipe: Recipe
    compute: ComputeSection
    measured: Mapping[str, float]
    """images/s of the candidates that were timed to replace ``auto``"""
    rounds_done: int
    iteration: int
    """steps already made of the round at which it goes on"""
    resumed: bool
    moved: str | None
    """what is not as it was when the run began, so that its bits may differ from here on"""
    replicate: tuple[int, int]
    """(this one, how many)"""


@dataclass(frozen=True)
class Notice:
    """Something a person should know; the search goes on."""

    text: str


Happening = Started | Notice | Event


@dataclass(frozen=True)
class Beside:
    """What happens to one of several replicates that run side by side."""

    replicate: int
    """its place among them, from 0"""
    seed: int
    of: int
    """replicates that are still to be done, these among them"""
    event: Happening


Tell = Callable[[Happening], None]
Show = Callable[[Happening | Beside], None]
