"""Rank 0 runs the search as in one process; every other rank does what it says, and writes nothing.

Masks, rewind values and saved states are handed out, never made twice: they are the same on all ranks by construction.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from fastlth.data.sources import Source
from fastlth.errors import EnvironmentFailure
from fastlth.recipe import DataSection, Recipe
from fastlth.training.engines.base import Chunk, Engine, Tensors
from fastlth.training.engines.make import make_engine
from fastlth.training.evaluate import Scores
from fastlth.training.parallel.team import Team, remark

END, SEARCH, RUN, MASKS, REWIND, LOAD = range(6)


class LeadingEngine:
    """Rank 0's engine: every change of the net and every step happens on all ranks."""

    def __init__(self, team: Team, recipe: Recipe, source: Source) -> None:
        self._team = team
        text = json.dumps(recipe.to_unordered()).encode()
        team.say(SEARCH, len(text), 0)
        team.hand_out(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._engine = make_engine(recipe, source, team)
        self.name, self.weight_names, self.prunable = (
            self._engine.name, self._engine.weight_names, self._engine.prunable)  # fmt: skip
        self.said = self._engine.said
        if drawn := remark(recipe, team.size):
            self.said.append(drawn)

    @property
    def layers(self) -> dict[str, str]:
        return self._engine.layers

    def rewind(self, start: Tensors) -> None:
        self._team.say(REWIND, 0, 0)
        self._engine.rewind(self._team.hand_out_all(self._engine.weights(), start))

    def set_masks(self, masks: Tensors) -> None:
        self._team.say(MASKS, 0, 0)
        self._team.hand_out_all(_masks_like(self._engine), masks)
        self._engine.set_masks(masks)

    def run(self, first: int, last: int) -> Chunk:
        self._team.say(RUN, first, last)
        return self._engine.run(first, last)

    def interval(self) -> Scores:
        return self._engine.interval()

    def evaluate(self, split: str, images: int | None = None) -> Scores:
        return self._engine.evaluate(split, images)

    def weights(self) -> dict[str, Tensor]:
        return self._engine.weights()

    def state(self) -> dict[str, Tensor]:
        return self._engine.state()

    def load_state(self, state: Tensors) -> None:
        self._team.say(LOAD, 0, 0)
        self._engine.load_state(self._team.hand_out_all(self._engine.state(), state))


@contextmanager
def leading(team: Team) -> Iterator[None]:
    """Rank 0's part. The others are sent home at the end, whatever happens."""
    try:
        yield
    finally:
        with suppress(EnvironmentFailure):  # they are gone: that has been said
            team.say(END, 0, 0)


def follow(team: Team, load: Callable[[DataSection], Source]) -> None:
    """The other ranks' life: until rank 0 says that it is over. ``load`` gives a recipe's data set.

    Signals are rank 0's affair, which is asked for a stop with all others.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if number := getattr(signal, name, None):  # Windows has no SIGUSR1
            signal.signal(number, signal.SIG_IGN)
    engine: Engine | None = None
    while True:
        what, a, b = team.hear(3)
        if what == END:
            return
        if what == SEARCH:
            text = bytes(team.hand_out(torch.zeros(a, dtype=torch.uint8)).tolist())
            engine = _engine(team, Recipe.from_dict(json.loads(text)), load)
            continue
        assert engine is not None, "a search comes first"
        if what == RUN:
            engine.run(a, b)
            engine.interval()  # its record holds one interval's steps and no more
        elif what == MASKS:
            engine.set_masks(team.hand_out_all(_masks_like(engine), None))
        elif what == REWIND:
            engine.rewind(team.hand_out_all(engine.weights(), None))
        elif what == LOAD:
            engine.load_state(team.hand_out_all(engine.state(), None))


def _engine(team: Team, recipe: Recipe, load: Callable[[DataSection], Source]) -> Engine:
    compute = dataclasses.replace(recipe.compute, device=team.device(recipe.compute.device))
    return make_engine(dataclasses.replace(recipe, compute=compute), load(recipe.data), team)


def _masks_like(engine: Engine) -> dict[str, Tensor]:
    weights = engine.weights()
    return {n: torch.empty(weights[n].shape, dtype=torch.bool) for n in engine.prunable}
