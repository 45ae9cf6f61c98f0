"""What a person sees of replicates side by side."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from rich.console import Console

from fastlth import ui
from fastlth.happenings import Beside, Started
from fastlth.search import RoundStarted
from fastlth.ui import View
from tests.helpers import compute, small_recipe

RECIPE = small_recipe(train__iterations=100, prune__rounds=3)


def started(replicate, rewind_to=0):
    recipe = dataclasses.replace(RECIPE, prune=dataclasses.replace(RECIPE.prune, rewind_to=rewind_to))
    return Started(Path("runs"), recipe, compute(RECIPE), {}, 0, 0, False, None, (replicate, 4))


def at(round, iteration):
    return RoundStarted(round, 1, 1, 1.0, iteration)


def shown(events, clock, monkeypatch):
    """Text and last state of the bar."""
    monkeypatch.setattr(ui.time, "monotonic", lambda: clock[0])
    view = View(Console(file=(screen := io.StringIO()), width=200), header="LeNet")
    for event, seconds in events:
        clock[0] += seconds
        view(event)
    return screen.getvalue(), view._progress.tasks[0]


def test_the_bar_counts_those_that_are_still_to_be_done(monkeypatch):
    """Of four replicates two were finished before."""
    events = [(Beside(r, r, 2, started(r)), 0) for r in (1, 3)]
    events += [(Beside(1, 1, 2, at(2, 0)), 1), (Beside(1, 1, 2, at(3, 100)), 9), (Beside(3, 3, 2, at(3, 100)), 0)]
    text, task = shown(events, [0.0], monkeypatch)
    assert (task.completed, task.total) == (800, 800)
    assert text.count("LeNet") == 1 and "replicate 4 of 4" in text


def test_every_rewind_point_has_a_bar_of_its_own(monkeypatch):
    first = [(Beside(r, r, 2, started(r)), 0) for r in (0, 1)]
    first += [(Beside(r, r, 2, at(3, 100)), 3600) for r in (0, 1)]
    second = [(Beside(r, r, 2, started(r, rewind_to=50)), 0) for r in (1, 0)]
    second += [(Beside(r, r, 2, at(0, 0)), 0) for r in (0, 1)] + [(Beside(0, 0, 2, at(0, 50)), 10)]
    text, task = shown(first + second, [0.0], monkeypatch)
    assert (task.completed, task.total) == (50, 2 * (100 + 3 * 50))
    assert task.fields["left"] == 10 / 50 * (500 - 50)
    assert text.count("LeNet") == 1
