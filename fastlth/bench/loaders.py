"""Loaders alone: how fast batches arrive. torchvision's DataLoader, FFCV, and the resident set."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fastlth.bench.paired import paired
from fastlth.bench.rivals import Plain
from fastlth.bench.subject import Row, masks_of_round, random_source, recipe_for, row
from fastlth.data import ffcv
from fastlth.data.loader import Loader
from fastlth.data.order import Order
from fastlth.data.resident import ResidentLoader


def rows(model: str, dataset: str, *, seconds: float = 4.0) -> Iterator[Row]:
    """Images/s of each of our loaders against a DataLoader with per-sample transforms."""
    recipe, source = recipe_for(model, dataset), random_source(dataset)
    batch = recipe.train.batch_size
    order = Order(len(source.train.labels), batch, True, (0, 3))
    everything, cpu = np.arange(len(source.train.labels)), torch.device("cpu")
    plain = Plain(recipe, source.train, masks_of_round(recipe, 0)[0])

    def theirs(count: int) -> None:
        for _ in range(count):
            next(plain.batches)

    with tempfile.TemporaryDirectory() as folder:
        loaders: dict[str, Loader] = {"resident": ResidentLoader(source.train, everything, order, cpu)}
        if ffcv.available() is None:
            loaders["ffcv"] = ffcv.FfcvLoader(source.train, everything, order, cpu, Path(folder))
        for name, loader in loaders.items():
            at = 0

            def ours(count: int, loader: Loader = loader) -> None:
                nonlocal at
                for _ in loader.batches(at, at + count):
                    pass
                at += count

            result = paired(ours, theirs, budget=seconds)
            yield row("loader", recipe, name, "torchvision DataLoader", 1.0, result, batch)
            loader.close()
