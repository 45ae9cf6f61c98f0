"""Small recipes and data, and the assertions that many tests share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlth.composition import compose
from fastlth.data.sources import Images, Source
from fastlth.recipe import ComputeSection, Recipe

CPU = {
    "compute.device": "cpu", "compute.precision": "fp32", "compute.compile": "off", "compute.channels_last": "off",
    "compute.loader": "resident", "compute.engine": "dense", "compute.threads": 1,
}  # fmt: skip


def small_recipe(model: str = "lenet-300-100", dataset: str = "digits", **settings: Any) -> Recipe:
    """A recipe of seconds: 40 iterations a round, evaluated every 10; keyword train__lr is train.lr."""
    base: dict[str, Any] = {
        "train.iterations": 40, "train.batch_size": 32, "train.lr": 1e-3, "evaluate.every": 10, "prune.rounds": 2,
        "data.validation": 64,
    }  # fmt: skip
    given = {name.replace("__", "."): value for name, value in settings.items()}
    return compose(model, dataset, settings={**base, **CPU, **given}).recipe


def compute(recipe: Recipe, **changes: Any) -> ComputeSection:
    """The recipe's compute section, which ``CPU`` leaves without ``auto``."""
    import dataclasses

    return dataclasses.replace(recipe.compute, **changes)


def random_source(name: str = "cifar-10", train: int = 320, test: int = 64, seed: int = 0) -> Source:
    """Random pixels in the shape of a data set; the label is the brightest of ten horizontal stripes."""
    shape = {"cifar-10": (32, 32, 3), "mnist": (28, 28, 1), "digits": (8, 8, 1)}[name]
    rng = np.random.default_rng(seed)

    def images(count: int) -> Images:
        labels = rng.integers(0, 10, count)
        pixels = rng.integers(0, 200, (count, *shape), dtype=np.uint8)
        rows = np.linspace(0, shape[0], 11).astype(int)
        for i, label in enumerate(labels):
            pixels[i, rows[label] : max(rows[label + 1], rows[label] + 1)] = 255
        return Images(pixels, labels.astype(np.int64))

    return Source(name, images(train), images(test))


def bits(tensor: Tensor) -> Tensor:
    """The bits of a float32 tensor: -0.0 and 0.0 differ, and a NaN equals itself."""
    return tensor.detach().contiguous().view(torch.int32)


def assert_masked(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Every pruned weight is +0.0, bit for bit."""
    for name, mask in masks.items():
        wrong = int((bits(weights[name])[~mask] != 0).sum())
        assert wrong == 0, f"{wrong} pruned weights of {name} are not +0.0"


def assert_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name


def assert_close_by_norm(a: Tensor, b: Tensor, tolerance: float) -> None:
    error = float((a - b).norm() / b.norm())
    assert error <= tolerance, f"relative error {error:.3g} is above {tolerance:g}"


def half_masks(weights: Mapping[str, Tensor], density: float = 0.5, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(w.shape, generator=generator) < density for n, w in weights.items()}
