"""Training steps: ours against good everyday PyTorch at every density of a search, and against lecode's way."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastlth.bench import memory, peak
from fastlth.bench.paired import Work, paired
from fastlth.bench.rivals import Eager, Plain
from fastlth.bench.subject import Ours, Row, blocks_on, masks_of_round, recipe_for, row, settle, source_for
from fastlth.data.sources import Source
from fastlth.recipe import ComputeSection, Recipe

OUR_DENSE = "our dense engine"


def rows(
    model: str, dataset: str, rounds: Sequence[int], *, seconds: float = 3.0, compiled: bool = False,
    dense: bool = False, peaks: bool = True, compute: ComputeSection | None = None,
) -> Iterator[Row]:  # fmt: skip
    """One row per path and density; about ``seconds`` each. ``share`` is of the peak measured in this run, counting
    the multiplications of the dense net; ``kept_layers`` of ours ran from their kept weights alone. With ``dense``,
    our dense engine with all layers dense too, where ``auto`` took another one or lets layers leave it. With ``peaks``,
    what each path takes of memory, measured once with the masks of the first round. ``compute`` is what ``settle``
    gives, found out where it is not given."""
    recipe = recipe_for(model, dataset)
    source, images = source_for(dataset)
    compute = compute or settle(recipe, source)
    recipe = dataclasses.replace(recipe, compute=compute)
    limit, flops = peak.measure(compute.device.split(":")[0]), peak.flops_per_image(recipe)
    batch, blocks = recipe.train.batch_size, blocks_on(compute.device)
    ours = Ours(recipe, source)
    paths = {"ours": ours}
    if dense and (compute.engine != "dense" or compute.kept):
        paths[OUR_DENSE] = Ours(_dense(recipe), source)
    names = [*paths, "eager", "plain", *(["compiled"] if compiled else [])]
    taken = memory.peak_bytes(recipe, "step", names, rounds[0] if rounds else 0) if peaks else {}

    def finished(one: Row) -> Row:
        return {**one, "images": images, "precision": compute.precision, "threads": compute.threads,
                "share": one["images_per_second"] * flops / limit[compute.precision],
                "peak_bytes": taken.get(one["path"]), "against_peak_bytes": taken.get(one["against"])}  # fmt: skip

    for round in rounds:
        masks, density = masks_of_round(recipe, round)
        for path, engine in paths.items():
            engine.prune(masks)
            result = paired(engine.steps, work(recipe, source, "eager", masks), budget=seconds, seed=round, **blocks)
            kept = sum(how == "kept" for how in engine.engine.layers.values())
            yield {**finished(row("step", recipe, path, "eager", density, result, batch)), "kept_layers": kept}
    masks, density = masks_of_round(recipe, 0)
    ours.prune(masks)
    plain = work(recipe, source, "plain", masks)
    result = paired(ours.steps, plain, budget=seconds, **blocks)
    yield finished(row("step", recipe, "ours", "plain", density, result, batch))
    everyday = work(recipe, source, "eager", masks)
    result = paired(everyday, plain, budget=seconds, **blocks)
    yield finished(row("step", recipe, "eager", "plain", density, result, batch))
    if compiled:
        result = paired(work(recipe, source, "compiled", masks), everyday, budget=seconds, **blocks)
        yield finished(row("step", recipe, "compiled", "eager", density, result, batch))


def work(recipe: Recipe, source: Source, path: str, masks: Mapping[str, Tensor]) -> Work:
    """Steps of one path: ours, "our dense engine", eager, compiled or plain. Raises ValueError for another."""
    if path in ("ours", OUR_DENSE):
        ours = Ours(recipe if path == "ours" else _dense(recipe), source)
        ours.prune(masks)
        return ours.steps
    if path == "plain":
        return Plain(recipe, source.train, masks).steps
    if path not in ("eager", "compiled"):
        raise ValueError(f"there is no path '{path}'")
    compute = recipe.compute
    return Eager(recipe, source.train, masks, precision=compute.precision, device=compute.device,
                 channels_last=compute.channels_last == "on", compiled=path == "compiled").steps  # fmt: skip


def can_compile() -> bool:
    """Whether ``torch.compile`` has what it needs here: a GPU or a C++ compiler."""
    return torch.cuda.is_available() or any(map(shutil.which, ("c++", "g++", "clang++")))


def _dense(recipe: Recipe) -> Recipe:
    threads = recipe.compute.threads if recipe.compute.engine == "dense" else torch.get_num_threads()
    compute = dataclasses.replace(recipe.compute, engine="dense", kept={}, threads=threads)
    return dataclasses.replace(recipe, compute=compute)
