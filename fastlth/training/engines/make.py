"""From a resolved recipe and a data set to an engine that is ready to train."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastlth.data import jpegs
from fastlth.data.ffcv import FfcvLoader
from fastlth.data.loader import Loader
from fastlth.data.order import Order, split
from fastlth.data.photo_loader import PhotoLoader
from fastlth.data.photos import Photos
from fastlth.data.resident import ResidentLoader
from fastlth.data.sources import Images, Rows, Source
from fastlth.data.streamed import StreamedLoader
from fastlth.recipe import Recipe
from fastlth.training.engines.base import Engine
from fastlth.training.engines.dense import DenseEngine
from fastlth.training.engines.graph import GraphEngine
from fastlth.training.engines.sparse import SparseEngine
from fastlth.training.step import Share


def make_engine(recipe: Recipe, source: Source, share: Share | None = None) -> Engine:
    """The engine of a recipe whose compute section holds no ``auto``; dense where several processes share it.

    Where the device has no room for it the images stay in host memory, and ``said`` tells so.
    Raises torch.OutOfMemoryError where that does not help.
    """
    try:
        return _make(recipe, source, share)
    except torch.OutOfMemoryError:
        if recipe.compute.loader != "resident" or share is not None:
            raise
    gc.collect()  # not in the handler, where the failed engine still lives; its parts know each other
    torch.cuda.empty_cache()
    engine = _streamed(recipe, source)
    before = "the graph engine and " if recipe.compute.engine == "graph" else ""
    engine.said.append(f"{recipe.compute.device} has not memory enough for {before}the data set: the dense engine "
                       "trains, and images are copied batch by batch")  # fmt: skip
    return engine


def _streamed(recipe: Recipe, source: Source) -> DenseEngine:
    splits = make_splits(recipe, source)
    order, device = make_order(recipe, len(splits["train"].labels)), torch.device(recipe.compute.device)
    loader = StreamedLoader(splits["train"], np.arange(order.images), order, device)
    dense = dataclasses.replace(recipe.compute, engine="dense")
    return DenseEngine(dataclasses.replace(recipe, compute=dense), loader, splits)


def _make(recipe: Recipe, source: Source, share: Share | None) -> Engine:
    splits = make_splits(recipe, source)
    if recipe.compute.engine == "sparse":
        return SparseEngine(recipe, make_order(recipe, len(splits["train"].labels)), splits)
    if recipe.compute.engine == "graph":
        return GraphEngine(recipe, make_order(recipe, len(splits["train"].labels)), splits)
    return DenseEngine(recipe, make_loader(recipe, source), splits, share=share)


def make_order(recipe: Recipe, images: int) -> Order:
    """The order in which the recipe sees ``images`` training images."""
    return Order(images, recipe.train.batch_size, recipe.train.drop_last, recipe.seeds.key("order"))


def make_loader(recipe: Recipe, source: Source) -> Loader:
    """The batches that the recipe trains on."""
    kept, _ = split(len(source.train.labels), recipe.data.validation, recipe.seeds.key("split"))
    order, device = make_order(recipe, len(kept)), torch.device(recipe.compute.device)
    if isinstance(photos := source.train.pixels, Photos):
        ours = recipe.compute.loader != "ffcv"
        decode = photos.decode if ours else jpegs.Decoder(jpegs.beton(photos, source.train.labels, beton_folder()))
        return PhotoLoader(decode, source.train.labels, kept, order, size=photos.size, key=recipe.seeds.key("augment"),
                           device=device)  # fmt: skip
    if recipe.compute.loader == "ffcv":
        return FfcvLoader(source.train, kept, order, device, beton_folder())
    return ResidentLoader(source.train, kept, order, device)


def make_splits(recipe: Recipe, source: Source) -> dict[str, Images]:
    """The images of "train", "validation" (held out of the training images) and "test"."""
    kept, held_out = split(len(source.train.labels), recipe.data.validation, recipe.seeds.key("split"))
    if isinstance(photos := source.train.pixels, Photos):
        labels, name = source.train.labels, photos.name
        train = Images(Rows(photos, kept), labels[kept], name)
        return {"train": train, "validation": Images(photos.squares(held_out), labels[held_out], name),
                "test": source.test}  # fmt: skip
    return {
        "train": _subset(source.train, kept),
        "validation": _subset(source.train, held_out),
        "test": source.test,
    }


def beton_folder() -> Path:
    """Where FFCV's files lie: a cache, since the data folder may be read-only."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("fastlth")) / "beton"


def _subset(images: Images, indices: NDArray[np.int64]) -> Images:
    every = images.pixels
    pixels = Rows(every, indices) if images.name and isinstance(every, np.ndarray) else every[indices]
    return Images(pixels, images.labels[indices], images.name)
