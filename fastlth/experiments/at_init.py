"""Masks before training, from a run's theta0: which images, how many weights where."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from fastlth_kernels.philox import Key
from torch import Tensor

from fastlth.data.normalise import normalise, table
from fastlth.data.order import epoch_order
from fastlth.errors import RecipeError
from fastlth.experiments.control import Control
from fastlth.experiments.workbench import Workbench
from fastlth.masks import Masks
from fastlth.models import loaded
from fastlth.pruning import at_init, budget
from fastlth.recipe import Recipe
from fastlth.training.engines.make import make_splits

IMAGES_PER_CLASS = 10  # as the programs of GraSP and SynFlow take them


def masks_at_init(
    bench: Workbench, control: Control, recipe: Recipe, target: float | Masks, theta0: Mapping[str, Tensor], key: Key
) -> Masks:
    """The masks of ``control.method`` at a density, or with as many weights as ``target``'s masks keep."""
    method = control.method
    shares = shares_at_init(bench, control, recipe, target)
    if method in ("random", "even", "erk"):
        return budget.random_masks(bench.prunable, shares, numbers=bench.numbers, round=0, key=key)
    model = loaded(bench.recipe, theta0)
    facts = recipe.data.facts
    if method == "synflow":
        return at_init.synflow(model, shares, facts.shape, numbers=bench.numbers, key=key)
    if method == "magnitude":
        scores = at_init.magnitude(model, bench.prunable)
    else:
        images, labels = _images(bench, recipe, control.images or IMAGES_PER_CLASS * facts.classes)
        scores = {"snip": at_init.snip, "grasp": at_init.grasp}[str(method)](model, bench.prunable, images, labels)
    return budget.keep_highest(scores, shares, numbers=bench.numbers, round=0, key=key)


def shares_at_init(bench: Workbench, control: Control, recipe: Recipe, target: float | Masks) -> budget.Budget:
    """How many weights ``control.method`` keeps where. Raises RecipeError for a density that no pruning leaves."""
    strategy = {"random": "global", "even": "even", "erk": "erk"}.get(str(control.method), control.scope or "global")
    if isinstance(target, float):
        return budget.of_density(strategy, bench.shapes, recipe.prune, target)
    if strategy in ("layer", "global"):
        return budget.of_masks(target, strategy)
    return budget.of_total(strategy, bench.prunable, sum(int(m.sum()) for m in target.values()))


def _images(bench: Workbench, recipe: Recipe, count: int) -> tuple[Tensor, Tensor]:
    """The first training images of the first epoch, normalised, not augmented: floats [N, C, H, W], int64 [N]."""
    images = make_splits(recipe, bench.source)["train"]
    if count > len(images.labels):
        raise RecipeError(f"--images must be at most the {len(images.labels)} training images, got {count}")
    first = epoch_order(len(images.labels), 0, recipe.seeds.key("order"))[:count]
    pixels = torch.from_numpy(np.asarray(images.pixels[first])).permute(0, 3, 1, 2)
    lookup = table(recipe.data.facts, recipe.data.normalise)
    return normalise(pixels, lookup, torch.float32), torch.from_numpy(images.labels[first])
