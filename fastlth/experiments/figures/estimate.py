"""About how long trainings take on this machine: their engines are made, timed for some intervals, and thrown away.

A step's time depends on the net, the data, the optimizer and, where weights are skipped on a CPU, the density; neither
on the learning rate nor on the length of training. So one engine is timed for all recipes that agree in the former.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlth.data.sources import load_for
from fastlth.experiments.figures.work import Training, run_of
from fastlth.experiments.settled import as_known, compute_of
from fastlth.experiments.supermasks.net import supermask_engine
from fastlth.recipe import ComputeSection, Recipe
from fastlth.side_by_side import cores
from fastlth.store.run import RECIPE, read_recipe
from fastlth.training.engines.base import Engine
from fastlth.training.engines.make import make_engine
from fastlth.training.resolve import prune_at_random

SECONDS = 0.3
"""of steps per density"""
INTERVALS = 3


@dataclass(frozen=True)
class Pace:
    """Seconds, measured."""

    compute: ComputeSection
    densities: tuple[float, ...]
    """rising"""
    step: tuple[float, ...]
    """one per density"""
    validation: float
    test: float

    def seconds(self, training: Training) -> float:
        """Of a training, evaluations included; with ``evaluate.test = "minimum"`` without those on test images, which
        become rare after the early stop."""
        recipe = training.recipe
        reads = self.validation + (self.test if recipe.evaluate.test == "always" else 0.0)
        step = float(np.interp(training.density, self.densities, self.step))
        trained_on = min(recipe.data.train_images, training.steps * recipe.train.batch_size)
        last = self.validation * trained_on / recipe.data.validation  # training accuracy, when a round is over
        whole = training.steps * step + -(-training.steps // recipe.evaluate.every) * reads + last
        sparse = self.compute.engine == "sparse"
        return whole / (min(training.beside, max(1, cores() // self.compute.threads)) if sparse else 1)


def estimate(
    trainings: Iterable[Training], out: Path, data_dir: Path | None, show: Callable[[str], None] = lambda _: None
) -> float:
    """Seconds for those trainings that are not done. Raises DataError, DeviceError and RecipeError as training does."""
    paces = Paces(out, data_dir, show)
    return sum(paces.seconds(training) for training in trainings if not training.done)


class Paces:
    """Seconds of trainings; each kind is measured when it is first asked for."""

    def __init__(self, out: Path, data_dir: Path | None, show: Callable[[str], None] = lambda _: None) -> None:
        self._out, self._data_dir, self._show = out, data_dir, show
        self._paces: dict[tuple[Any, ...], Pace] = {}

    def of(self, training: Training) -> Pace:
        """Raises DataError, DeviceError and RecipeError as training does."""
        key = _alike(training)
        if key not in self._paces:
            name = f"{training.recipe.model.name} on {training.recipe.data.name}"
            self._show(f"timing {name}{', supermask' if training.plan else ''}")
            self._paces[key] = _pace(training, self._out, self._data_dir)
        return self._paces[key]

    def seconds(self, training: Training) -> float:
        return self.of(training).seconds(training)


def _alike(training: Training) -> tuple[Any, ...]:
    r = training.recipe
    plan = training.plan.label if training.plan else None
    return (r.model, r.data.name, r.data.facts.shape, r.data.augment, r.train.batch_size, r.train.optimizer,
            bool(r.train.momentum), r.prune.mask_0, _last_density(r), r.compute, plan)  # fmt: skip


def _last_density(recipe: Recipe) -> float:
    return (1 - recipe.prune.rate) ** recipe.prune.rounds


def _pace(training: Training, out: Path, data_dir: Path | None) -> Pace:
    recipe, source = training.recipe, load_for(training.recipe.data, data_dir)

    def make(candidate: Recipe) -> Engine:
        if training.plan is not None:
            return supermask_engine(candidate, source, training.plan)[0]
        return make_engine(candidate, source)

    compute = _resolved(recipe, out, make)
    engine = make(dataclasses.replace(recipe, compute=compute))
    last = _last_density(recipe)
    validation, test = _evaluation(engine, "validation"), _evaluation(engine, "test")
    steps, falls = {}, compute.engine == "sparse" or bool(compute.kept)
    for density in sorted({last, last**0.5, 1.0} if falls else {1.0}, reverse=True):
        prune_at_random(engine, density)  # the dense net comes first: this brings nothing back
        steps[density] = _step(engine, recipe)
    return Pace(compute, tuple(reversed(steps)), tuple(reversed(steps.values())), validation, test)


def _resolved(recipe: Recipe, out: Path, make: Callable[[Recipe], Engine]) -> ComputeSection:
    """What ``auto`` is in the run if it has begun and its device is still there, else what it would be."""
    file = run_of(out, recipe) / RECIPE
    return compute_of(as_known(recipe, make, read_recipe(file)[1] if file.exists() else {}))


def _step(engine: Engine, recipe: Recipe) -> float:
    """The median of some intervals, or of parts of one where they are long."""

    def took(steps: int) -> float:
        engine.interval()  # its record holds one interval's steps and no more
        return _timed(lambda: engine.run(0, steps)) / steps

    took(1)  # warms up
    longest = min(recipe.evaluate.every, recipe.train.iterations)
    steps = max(1, min(longest, int(SECONDS / INTERVALS / max(took(1), 1e-9))))
    return statistics.median(took(steps) for _ in range(INTERVALS))


def _evaluation(engine: Engine, split: str) -> float:
    engine.evaluate(split)
    return _timed(lambda: engine.evaluate(split))


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
