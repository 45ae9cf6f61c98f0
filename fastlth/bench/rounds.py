"""A stretch of a round as a search runs it: steps, validation at every interval, the test set now and then."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from fastlth.bench.paired import paired
from fastlth.bench.rivals import Eager, normalised
from fastlth.bench.subject import Ours, Row, masks_of_round, random_source, recipe_for, row
from fastlth.catalogue import DATASETS
from fastlth.training.engines.make import make_engine
from fastlth.training.resolve import resolve

TEST_EVERY = 4  # a search reads the test set at new minima only: about every fourth evaluation


def rows(model: str, dataset: str, *, interval: int = 100, seconds: float = 10.0) -> Iterator[Row]:
    """Ours against eager, both with the paper's evaluations: 5,000 validation and 10,000 test images."""
    recipe = recipe_for(model, dataset)
    facts = DATASETS[dataset]
    source = random_source(dataset, images=13_192)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, validation=facts.validation))
    compute = resolve(recipe, lambda candidate: make_engine(candidate, source)).compute
    recipe = dataclasses.replace(recipe, compute=compute)
    masks, density = masks_of_round(recipe, 0)
    ours = Ours(recipe, source)
    ours.prune(masks)
    eager = Eager(recipe, source.train, masks, precision=compute.precision,
                  channels_last=compute.channels_last == "on", device=compute.device)  # fmt: skip
    held_out = normalised(source.train, facts)[: facts.validation].to(compute.device)
    test = normalised(source.test, facts).to(compute.device)
    labels = torch.from_numpy(source.train.labels[: facts.validation]).to(compute.device)
    test_labels = torch.from_numpy(source.test.labels).to(compute.device)

    def our_intervals(count: int) -> None:
        for i in range(count):
            ours.steps(interval)
            ours.engine.evaluate("validation")
            if i % TEST_EVERY == 0:
                ours.engine.evaluate("test")

    def their_intervals(count: int) -> None:
        for i in range(count):
            eager.steps(interval)
            eager.evaluate(held_out, labels)
            if i % TEST_EVERY == 0:
                eager.evaluate(test, test_labels)

    result = paired(our_intervals, their_intervals, budget=seconds)
    yield row("round", recipe, "ours", "eager", density, result, interval * recipe.train.batch_size)
