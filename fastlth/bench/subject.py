"""What every speed subject starts from: a recipe, images in its shape, masks of a round, our own steps.

Images are real ones where they lie on this machine, and random ones otherwise, so that nothing has to be downloaded.
What they show matters to one engine only: the sparse engine multiplies by no pixel that is black in a whole batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlth.bench.paired import Paired
from fastlth.catalogue import DATASETS, dataset_name, model_name
from fastlth.composition import compose, presets_for
from fastlth.data.sources import Images, Source, data_root, load, state
from fastlth.errors import RecipeError
from fastlth.models import skeleton, weight_names
from fastlth.pruning import groups, layer_rates
from fastlth.recipe import ComputeSection, Recipe
from fastlth.training.engines.base import Engine
from fastlth.training.engines.make import make_engine
from fastlth.training.resolve import resolve

IMAGES = 8_192  # more than the caches hold, less than a laptop's patience
TEST = 1_000
ROWS = 1_000  # steps between two readings of an engine's record
STEPS = 1_000 * ROWS  # after so many a training begins anew; the graph engine has a learning rate for each
USUAL: dict[str, Any] = {"train.iterations": ROWS, "train.batch_size": 128, "train.optimizer": "sgd", "train.lr": 0.1,
                         "train.momentum": 0.9, "train.weight_decay": 1e-4}  # fmt: skip
"""where no preset covers a pair"""

Row = dict[str, Any]


def recipe_for(model: str, dataset: str) -> Recipe:
    """The pair's default preset, or SGD at batch 128 where none covers it, with an evaluation interval that leaves the
    timer alone. Raises RecipeError for a data set whose shape is not in the catalogue."""
    name = dataset_name(dataset)
    if name not in DATASETS:
        raise RecipeError(f"bench takes the shape of {', '.join(DATASETS)}, not of '{dataset}'; name one of them")
    settings = {} if presets_for(model_name(model), name) else dict(USUAL)
    if name != "digits":
        settings["data.validation"] = 1_000
    recipe = compose(model, name, settings=settings).recipe
    return dataclasses.replace(
        recipe,
        train=dataclasses.replace(recipe.train, iterations=STEPS),
        evaluate=dataclasses.replace(recipe.evaluate, every=ROWS),
    )


def source_for(dataset: str, images: int = IMAGES, test: int = TEST) -> tuple[Source, str]:
    """The first images of a data set and "real" where it lies on this machine, else random ones and "random"."""
    name, root = dataset_name(dataset), data_root()
    if state(name, root) != "ready":
        return random_source(name, images, test=test), "random"
    found = load(name, root, download=False)
    train, held_out = (Images(some.pixels[:count], some.labels[:count])
                       for some, count in ((found.train, images), (found.test, test)))  # fmt: skip
    return dataclasses.replace(found, train=train, test=held_out), "real"


def random_source(dataset: str, images: int = IMAGES, seed: int = 0, test: int = TEST) -> Source:
    """Random pixels and labels in the shape of a data set: ``images`` to train and validate on, ``test`` to test."""
    facts = DATASETS[dataset_name(dataset)]
    channels, height, width = facts.shape
    rng = np.random.default_rng(seed)

    def some(count: int) -> Images:
        pixels = rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
        return Images(pixels, rng.integers(0, facts.classes, count))

    return Source(dataset, some(min(images, facts.train)), some(min(test, facts.test)))


def settle(recipe: Recipe, source: Source) -> ComputeSection:
    """What every ``auto`` of the recipe becomes here; takes some seconds."""
    return resolve(recipe, lambda candidate: make_engine(candidate, source)).compute


def masks_of_round(recipe: Recipe, round: int) -> tuple[dict[str, Tensor], float]:
    """Random masks with the counts of a round of the recipe, and their density (kept / all weights)."""
    net = skeleton(recipe)
    names = weight_names(net)
    sizes = {n: net.get_parameter(n).numel() for n in names}
    rates = layer_rates(names, recipe.prune)
    kept = {n: sizes[n] for n in rates}
    for _ in range(round):
        for together, gone in groups(rates, kept, recipe.prune.scope):
            total = sum(kept[n] for n in together)
            for n in together:  # global scope: what a ranking of random scores takes from each layer
                kept[n] -= gone * kept[n] // total
    rng = np.random.default_rng(round)
    masks = {}
    for n, count in kept.items():
        flat = np.zeros(sizes[n], bool)
        flat[rng.permutation(sizes[n])[:count]] = True
        masks[n] = torch.from_numpy(flat.reshape(net.get_parameter(n).shape))
    unpruned = sum(sizes.values()) - sum(sizes[n] for n in rates)
    return masks, (sum(kept.values()) + unpruned) / sum(sizes.values())


def blocks_on(device: str, steps: int = 1) -> dict[str, Any]:
    """What ``paired`` is told of a device, for calls of so many training steps. A GPU is given its work ahead, so a
    block has at least 100 steps, and the clock is read when all of them are done."""
    if not device.startswith("cuda"):
        return {}
    return {"least_calls": -(-100 // steps), "wait": lambda: torch.cuda.synchronize(device)}


class Ours:
    """Our engine as work for the timer: ``steps(n)`` trains n steps."""

    def __init__(self, recipe: Recipe, source: Source) -> None:
        self.engine: Engine = make_engine(recipe, source)
        self._start = {n: t.clone() for n, t in self.engine.weights().items()}
        self._at = 0

    def prune(self, masks: Mapping[str, Tensor]) -> None:
        """Start again from the initial weights under these masks."""
        self.engine.set_masks(masks)
        self.engine.rewind(self._start)
        self._at = 0

    def steps(self, count: int) -> None:
        """Train ``count`` steps, going on where the last call ended."""
        while count:
            if self._at % ROWS == 0 and self._at:
                self.engine.interval()
                self._at %= STEPS
            some = min(count, ROWS - self._at % ROWS)
            self.engine.run(self._at, self._at + some)
            self._at += some
            count -= some


def row(subject: str, recipe: Recipe, path: str, against: str, density: float, result: Paired, images: int) -> Row:
    """One comparison: ``result`` is of ``paired(ours, theirs)`` with ``images`` per call."""
    return {
        "subject": subject, "model": recipe.model.name, "dataset": recipe.data.name, "path": path,
        "density": density, "images_per_second": images / result.seconds_a, "against": against,
        "against_images_per_second": images / result.seconds_b,
        "ratio": result.ratio, "ratio_low": result.low, "ratio_high": result.high,
        "control": [result.control_low, result.control_high], "n": result.pairs,
        "seconds_quantiles": list(result.quantiles_a),
    }  # fmt: skip
