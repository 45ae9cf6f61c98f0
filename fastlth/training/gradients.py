"""The gradient of the mean training loss at given weights, for the criteria that look at it.

Lee et al. 2019 (SNIP) take it over one mini-batch of the training set; here it is over all training images, as they
are, which leaves no choice of a batch to a seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlth.data.normalise import normalise, table
from fastlth.data.sources import Images
from fastlth.models import loaded, weight_names
from fastlth.recipe import Recipe
from fastlth.training import host

BATCH = 1000


def gradients(recipe: Recipe, images: Images, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """dL/dw of every Linear and Conv weight at ``values`` (parameters and buffers, which stay as they are).

    L is the mean cross-entropy over ``images``, in float32, without augmentation and dropout; batch norm uses the
    statistics of each batch. On the device of ``recipe.compute``.
    """
    device = torch.device(recipe.compute.device)
    model = loaded(recipe, values)
    model.to(device).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    pixels, labels = torch.from_numpy(np.asarray(images.pixels)), torch.from_numpy(images.labels)
    lookup = table(recipe.data.facts, recipe.data.normalise).to(device)
    parts = -(-len(labels) // BATCH)  # of nearly equal sizes, so that no batch is too small for batch norm
    with (
        host.settings(recipe.compute.threads or torch.get_num_threads()),
        host.algorithms(device, deterministic=recipe.compute.deterministic),
    ):
        for x, y in zip(pixels.tensor_split(parts), labels.tensor_split(parts), strict=True):
            x = normalise(x.to(device).permute(0, 3, 1, 2), lookup, torch.float32)
            loss = F.cross_entropy(model(x), y.to(device), reduction="sum") / len(labels)
            loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    parameters = dict(model.named_parameters())
    for name in weight_names(model):
        gradient = parameters[name].grad  # None: an own net may hold layers that it does not use
        found[name] = torch.zeros_like(parameters[name]) if gradient is None else gradient.detach()
    return found
