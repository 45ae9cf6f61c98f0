"""How many replicates a GPU's free memory holds at once.

A replicate of P parameters that is trained as part of a fleet takes, in bytes,

    P (4 weight + 4 per moment + 4 gradient + 2 bf16 copy + 1/8 mask)  +  8 per value and image at once  +  4 per image

where the values are those of the image and of every layer's output, and the images themselves are there once. An
estimate, from above where it is not exact; what still does not fit is found when the fleet is made, and halved.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from fastlth.data.sources import Source
from fastlth.models import skeleton
from fastlth.recipe import Recipe
from fastlth.training.engines import graph
from fastlth.training.engines.fleet import EVALUATION_BATCH

SHARE = 0.8  # of what is free: libraries have workspaces, and allocators round up


def fits(recipe: Recipe, source: Source, free: int) -> int:
    """Replicates trained as one net that ``free`` bytes hold, at least 1."""
    train, facts = recipe.train, recipe.data.facts
    parameters = sum(p.numel() for p in skeleton(recipe).parameters())
    moments = 2 if train.optimizer != "sgd" else int(train.momentum > 0)
    each = 8 + 4 * moments + (2 if recipe.compute.precision == "bf16" else 0) + 1 / 8
    images = sum(len(part.labels) for part in (source.train, source.test))
    at_once = max(train.batch_size, min(EVALUATION_BATCH, images))
    bytes_each = parameters * each + 8 * _values(recipe) * at_once + 4 * 2 * images
    shared = images * (math.prod(facts.shape) + 8) + graph.ORDER_BYTES
    return max(1, int((SHARE * free - shared) // bytes_each))


def measured(make: Callable[[], object], device: str, before: int) -> int:
    """How many of what ``make`` makes the ``before`` free bytes of a device hold, at least 1: by making one."""
    one = make()
    taken = before - (free(device) or 0)
    del one
    gc.collect()
    return max(1, int(SHARE * before // max(taken, 1)))


def _values(recipe: Recipe) -> int:
    """Of an image and of what every layer makes of it."""
    counts = [math.prod(recipe.data.facts.shape)]
    x = torch.empty(1, *recipe.data.facts.shape, device="meta")
    for module in skeleton(recipe).children():
        x = module(x)
        counts.append(0 if isinstance(module, nn.Flatten) else x.numel())
    return sum(counts)


def free(device: str) -> int | None:
    """Bytes that are free on a CUDA device; None elsewhere, where nothing limits a fleet."""
    if not device.startswith("cuda"):
        return None
    gc.collect()  # what was timed before is still held
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(torch.device(device))[0]


def groups(replicates: Sequence[int], most: int) -> list[list[int]]:
    """In order, as few as can be, of nearly equal sizes."""
    count = -(-len(replicates) // most)
    ends = [len(replicates) * i // count for i in range(count + 1)]
    return [list(replicates[a:b]) for a, b in pairwise(ends)]
