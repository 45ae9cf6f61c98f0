"""A stretch of a round as a search runs it: steps, validation at every interval, the test set now and then."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from fastlth.bench import memory
from fastlth.bench.paired import Work, paired
from fastlth.bench.rivals import Eager, normalised
from fastlth.bench.subject import Ours, Row, blocks_on, masks_of_round, recipe_for, row, settle, source_for
from fastlth.data.sources import Source
from fastlth.recipe import ComputeSection, Recipe

TEST_EVERY = 4  # a search reads the test set at new minima only: about every fourth evaluation


def rows(
    model: str, dataset: str, *, interval: int = 100, seconds: float = 10.0, peaks: bool = True,
    compute: ComputeSection | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Ours against eager, both with the paper's evaluations: 5,000 validation and 10,000 test images. With ``peaks``,
    what each takes of memory; ``compute`` as in ``step.rows``."""
    recipe = with_validation(recipe_for(model, dataset))
    images, kind = source(recipe)
    compute = compute or settle(recipe, images)
    recipe = dataclasses.replace(recipe, compute=compute)
    ours, eager = (work(recipe, images, path, interval=interval) for path in ("ours", "eager"))
    result = paired(ours, eager, budget=seconds, **blocks_on(compute.device, interval))
    one = row("round", recipe, "ours", "eager", masks_of_round(recipe, 0)[1], result,
              interval * recipe.train.batch_size)  # fmt: skip
    taken = memory.peak_bytes(recipe, "round", ["ours", "eager"]) if peaks else {}
    yield {**one, "images": kind, "peak_bytes": taken.get("ours"), "against_peak_bytes": taken.get("eager")}


def with_validation(recipe: Recipe) -> Recipe:
    """The recipe with as many images held out as the papers hold out."""
    data = dataclasses.replace(recipe.data, validation=recipe.data.facts.validation)
    return dataclasses.replace(recipe, data=data)


def source(recipe: Recipe) -> tuple[Source, str]:
    """8,192 images to train on beside the 5,000 held out, and 10,000 to test; "real" or "random"."""
    return source_for(recipe.data.name, images=13_192, test=10_000)


def work(recipe: Recipe, images: Source, path: str, *, interval: int) -> Work:
    """Intervals of one path, ours or eager: so many steps and their evaluations. Raises ValueError for another."""
    if path not in ("ours", "eager"):
        raise ValueError(f"there is no path '{path}'")
    masks, _ = masks_of_round(recipe, 0)
    if path == "ours":
        ours = Ours(recipe, images)
        ours.prune(masks)

        def our_intervals(count: int) -> None:
            for i in range(count):
                ours.steps(interval)
                ours.engine.evaluate("validation")
                if i % TEST_EVERY == 0:
                    ours.engine.evaluate("test")

        return our_intervals

    facts, compute = recipe.data.facts, recipe.compute
    eager = Eager(recipe, images.train, masks, precision=compute.precision,
                  channels_last=compute.channels_last == "on", device=compute.device)  # fmt: skip
    held_out = normalised(images.train, facts)[: facts.validation].to(compute.device)
    test = normalised(images.test, facts).to(compute.device)
    labels = torch.from_numpy(images.train.labels[: facts.validation]).to(compute.device)
    test_labels = torch.from_numpy(images.test.labels).to(compute.device)

    def their_intervals(count: int) -> None:
        for i in range(count):
            eager.steps(interval)
            eager.evaluate(held_out, labels)
            if i % TEST_EVERY == 0:
                eager.evaluate(test, test_labels)

    return their_intervals
