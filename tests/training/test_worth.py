"""What a smaller net is worth: the line by hand, and what is timed by a clock that ticks with the engine's work."""

from __future__ import annotations

import dataclasses

import pytest

from fastlth.training import resolve, worth
from fastlth.training.engines.graph import GraphEngine
from fastlth.training.engines.make import make_engine
from tests.helpers import compute, random_source, small_recipe


@pytest.mark.parametrize(("steps", "whole", "small", "work", "capture", "expected"), [
    (1000, 2e-3, 1e-3, 0.5, 0.25, 0.75),  # half the work saves 1 s, twice the capture is half of that: a quarter of it
    (1000, 2e-3, 1e-3, 0.5, 0.0, 1.0),
    (1000, 2e-3, 1e-3, 0.5, 0.9, 0.1),
    (1000, 2e-3, 1e-3, 0.5, 2.0, 0.0),  # not even a net without work
    (1000, 1e-3, 1e-3, 0.5, 0.1, 0.0), (1000, 1e-3, 2e-3, 0.5, 0.1, 0.0),
])  # fmt: skip
def test_the_limit_by_hand(steps, whole, small, work, capture, expected):
    assert worth.limit(steps, whole, small, work, capture) == pytest.approx(expected)


class Played:
    """A machine on which steps and captures take what is said."""

    def __init__(self, monkeypatch, whole: float, small: float, capture: float) -> None:
        self.now = 0.0
        inner = GraphEngine.advance

        def advance(engine, first, last):
            self.now += (last - first) * (whole if engine.small is None else small)
            return inner(engine, first, last)

        def captured(engine):
            self.now += capture
            return {}

        monkeypatch.setattr(GraphEngine, "advance", advance)
        monkeypatch.setattr(GraphEngine, "_captured", captured)

    def __call__(self) -> float:
        return self.now


def recipe_of(**settings):
    given = {"compute__engine": "graph", "compute__compact": 1.0, "train__iterations": 400, "evaluate__every": 2}
    return small_recipe("conv-2", "digits", **{**given, **settings})


def test_measured_is_the_limit_of_what_was_timed(monkeypatch):
    recipe = recipe_of()
    engine = make_engine(recipe, random_source("digits", train=160))
    clock = Played(monkeypatch, 2e-3, 1e-3, 0.05)
    found = worth.measured(engine, recipe, clock)
    widths = [len(p) for n, p in engine.small.net.named_parameters() if n.endswith("weight")]
    assert widths == [32, 32, 128, 128, 10]
    whole = 64 * 9 * 64 + 64 * 576 * 64 + 256 * 64 * 16 + 256 * 256 + 2560  # 8 x 8 images, halved once
    left = 32 * 9 * 64 + 32 * 288 * 64 + 128 * 32 * 16 + 128 * 128 + 1280
    assert found == pytest.approx(worth.limit(400, 2e-3, 1e-3, left / whole, 0.05))
    assert 0 < found < 1


def test_auto_is_measured_on_cuda_alone_and_never_elsewhere(monkeypatch):
    source = random_source("digits", train=160)
    recipe = recipe_of(compute__compact=-1.0)
    settled = resolve.resolve(recipe, lambda r: make_engine(r, source)).compute
    assert (settled.engine, settled.compact) == ("graph", 0.0)
    asked = dataclasses.replace(recipe, compute=compute(recipe, compact=0.25))
    assert resolve.resolve(asked, lambda r: make_engine(r, source)).compute.compact == 0.25
    made = []

    def make(one):
        made.append(one.compute.compact)
        on_cpu = dataclasses.replace(one, compute=dataclasses.replace(one.compute, device="cpu"))
        return make_engine(on_cpu, source)

    monkeypatch.setattr(worth, "measured", lambda engine, one: 0.61234 if isinstance(engine, GraphEngine) else 1 / 0)
    there = compute(recipe, device="cuda:0", compact=-1.0)
    assert resolve._compact(recipe, there, make) == 0.612 and made == [1.0]
    for change in ({"engine": "dense"}, {"compile": "on"}, {"kernels": "triton"}):
        assert resolve._compact(recipe, dataclasses.replace(there, **change), make) == 0.0
    once = dataclasses.replace(recipe, prune=dataclasses.replace(recipe.prune, rounds=0))
    assert resolve._compact(once, there, make) == 0.0 and made == [1.0]
