"""At which size a smaller net is worth its graphs: measured once per run, by a net of half the units.

    saved per round = steps (whole - small) (1 - work) / (1 - work of half the units)     on a line between the two
    worth it        where that is GAIN times the seconds of the capture

Rounds then choose by their own masks and this one number, so that a resumed search chooses alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch

from fastlth.models import skeleton
from fastlth.models.channels import work_left
from fastlth.recipe import Recipe
from fastlth.training.engines.graph import GraphEngine

GAIN = 2.0
CALLS, STEPS = 7, 20
Clock = Callable[[], float]


def limit(steps: int, whole: float, small: float, work: float, capture: float) -> float:
    """The largest share of a net's multiplications at which a round of ``steps`` steps gains; 0 where none does.

    whole, small: seconds of a step of the whole net and of one with the share ``work`` left; capture: seconds.
    """
    saved = steps * (whole - small)
    if saved <= 0:
        return 0.0
    return max(0.0, 1 - (1 - work) * GAIN * capture / saved)


def measured(engine: GraphEngine, recipe: Recipe, clock: Clock = time.perf_counter) -> float:
    """``limit`` for the recipe, from an engine of it with ``compute.compact`` 1; a few seconds. Leaves the engine in
    some round of its own."""
    start = {n: t.clone() for n, t in engine.weights().items()}
    whole = {n: torch.ones_like(start[n], dtype=torch.bool) for n in engine.prunable}
    engine.set_masks(whole)
    engine.rewind(start)
    seconds = _step(engine, recipe, clock)
    engine.set_masks(half_of_the_units(engine))
    began = clock()
    engine.rewind(start)
    first = clock() - began
    if engine.small is None:
        return 0.0
    began = clock()
    engine.rewind(start)  # the same widths: all but the capture
    capture = first - (clock() - began)
    widths = {n: w.shape[0] for n, w in engine.small.net.named_parameters() if n.endswith("weight") and w.dim() > 1}
    gone = {n.removesuffix(".weight"): torch.arange(len(start[n])).numpy() >= width for n, width in widths.items()}
    work = work_left(skeleton(recipe), recipe.data.facts.shape, gone)
    return limit(recipe.train.iterations, seconds, _step(engine, recipe, clock), work, max(capture, 0.0))


def half_of_the_units(engine: GraphEngine) -> dict[str, torch.Tensor]:
    """Masks with which the second half of each prunable layer's units is neither fed nor read. Of the last layer's,
    which are the logits, all stay."""
    weights = engine.weights()
    masks = {n: torch.ones_like(weights[n], dtype=torch.bool) for n in engine.prunable}
    for name, behind in pairwise(engine.weight_names):
        if name in masks and behind in masks:
            masks[name][len(masks[name]) // 2 :] = False
            masks[behind][:, masks[behind].shape[1] // 2 :] = False
    return masks


def _step(engine: GraphEngine, recipe: Recipe, clock: Clock) -> float:
    """Median seconds of a step."""
    steps, times = min(STEPS, recipe.evaluate.every, recipe.train.iterations), []
    for _ in range(CALLS):
        engine.interval()
        began = clock()
        engine.run(0, steps)
        times.append((clock() - began) / steps)
    return median(times[1:])
