"""Masks before training, from a run's theta0: which images, how many weights where."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from fastlth_kernels.philox import Key
from torch import Tensor, nn

from fastlth.data.normalise import normalise, table
from fastlth.data.order import epoch_order
from fastlth.errors import RecipeError
from fastlth.experiments.control import Control
from fastlth.experiments.workbench import Workbench
from fastlth.masks import Masks
from fastlth.models import loaded, skeleton, weight_names
from fastlth.pruning import at_init, budget
from fastlth.recipe import Recipe
from fastlth.training.engines.make import make_splits

IMAGES_PER_CLASS = 10  # as the programs of GraSP and SynFlow take them


def check(recipe: Recipe, control: Control, trials: int | None) -> None:
    """Raises RecipeError for what a run of ``recipe`` could not be given, before there is one."""
    control.trials(trials)
    if control.density is not None:
        model = skeleton(recipe)
        shapes = {n: tuple(model.get_parameter(n).shape) for n in weight_names(model)}
        budget.of_density(_strategy(control), shapes, recipe.prune, control.density)
    check_images(recipe, control)


def check_images(recipe: Recipe, control: Control) -> None:
    """Raises RecipeError for scores over more images than there are to train on, or over one with batch norm."""
    if control.method in ("snip", "grasp"):
        normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in skeleton(recipe).modules())
        if _count(control, recipe, recipe.data.train_images) == 1 and normed:
            raise RecipeError("--images must be at least 2 for a net with batch norm, whose statistics are over them, "
                              "got 1")  # fmt: skip


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
        images, labels = _images(bench, control, recipe)
        score = at_init.snip if method == "snip" else at_init.grasp
        scores = score(model, bench.prunable, images, labels, between=bench.ask)
    return budget.keep_highest(scores, shares, numbers=bench.numbers, round=0, key=key)


def shares_at_init(bench: Workbench, control: Control, recipe: Recipe, target: float | Masks) -> budget.Budget:
    """How many weights ``control.method`` keeps where. Raises RecipeError for a density that no pruning leaves."""
    strategy = _strategy(control)
    if isinstance(target, float):
        return budget.of_density(strategy, bench.shapes, recipe.prune, target)
    if strategy in ("layer", "global"):
        return budget.of_masks(target, strategy)
    return budget.of_total(strategy, bench.prunable, sum(int(m.sum()) for m in target.values()))


def _strategy(control: Control) -> str:
    return {"random": "global", "even": "even", "erk": "erk"}.get(str(control.method), control.scope or "global")


def _count(control: Control, recipe: Recipe, there: int) -> int:
    """How many images the scores are taken over. Raises RecipeError for more than are ``there``."""
    count = control.images or IMAGES_PER_CLASS * recipe.data.facts.classes
    if count > there:
        raise RecipeError(f"--images must be at most the {there} training images, got {count}")
    return count


def _images(bench: Workbench, control: Control, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The first training images of the first epoch, normalised, not augmented: floats [N, C, H, W], int64 [N]."""
    images = make_splits(recipe, bench.source)["train"]
    there = len(images.labels)
    first = epoch_order(there, 0, recipe.seeds.key("order"))[: _count(control, recipe, there)]
    pixels = torch.from_numpy(np.asarray(images.pixels[first])).permute(0, 3, 1, 2)
    lookup = table(recipe.data.facts, recipe.data.normalise)
    return normalise(pixels, lookup, torch.float32), torch.from_numpy(images.labels[first])
