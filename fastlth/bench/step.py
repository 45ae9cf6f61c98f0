"""Training steps: ours against good everyday PyTorch at every density of a search, and against lecode's way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from fastlth.bench import peak
from fastlth.bench.paired import paired
from fastlth.bench.rivals import Eager, Plain
from fastlth.bench.subject import Ours, Row, masks_of_round, random_source, recipe_for, row
from fastlth.training.engines.make import make_engine
from fastlth.training.resolve import resolve


def rows(
    model: str, dataset: str, rounds: Sequence[int], *, seconds: float = 3.0, compiled: bool = False,
    dense: bool = False,
) -> Iterator[Row]:  # fmt: skip
    """One row per path and density; about ``seconds`` each. ``share`` is of the peak measured in this run, counting
    the multiplications of the dense net. With ``dense``, our dense engine too where ``auto`` took another one."""
    recipe, source = recipe_for(model, dataset), random_source(dataset)
    compute = resolve(recipe, lambda candidate: make_engine(candidate, source)).compute
    recipe = dataclasses.replace(recipe, compute=compute)
    peaks, flops = peak.measure(compute.device.split(":")[0]), peak.flops_per_image(recipe)
    batch, layout = recipe.train.batch_size, compute.channels_last == "on"
    ours = Ours(recipe, source)
    paths = {"ours": ours}
    if dense and compute.engine != "dense":
        threads = torch.get_num_threads()
        other = dataclasses.replace(compute, engine="dense", threads=threads)
        paths["our dense engine"] = Ours(dataclasses.replace(recipe, compute=other), source)

    def eager(round: int, **options: bool) -> Eager:
        return Eager(recipe, source.train, masks_of_round(recipe, round)[0], precision=compute.precision,
                     channels_last=layout, device=compute.device, **options)  # fmt: skip

    def finished(one: Row) -> Row:
        return {**one, "precision": compute.precision, "threads": compute.threads,
                "share": one["images_per_second"] * flops / peaks[compute.precision]}  # fmt: skip

    for round in rounds:
        masks, density = masks_of_round(recipe, round)
        for path, engine in paths.items():
            engine.prune(masks)
            result = paired(engine.steps, eager(round).steps, budget=seconds, seed=round)
            yield finished(row("step", recipe, path, "eager", density, result, batch))
    masks, density = masks_of_round(recipe, 0)
    ours.prune(masks)
    plain = Plain(recipe, source.train, masks)
    result = paired(ours.steps, plain.steps, budget=seconds)
    yield finished(row("step", recipe, "ours", "plain", density, result, batch))
    everyday = eager(0)
    result = paired(everyday.steps, plain.steps, budget=seconds)
    yield finished(row("step", recipe, "eager", "plain", density, result, batch))
    if compiled:
        result = paired(eager(0, compiled=True).steps, everyday.steps, budget=seconds)
        yield finished(row("step", recipe, "compiled", "eager", density, result, batch))
