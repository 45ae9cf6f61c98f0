"""Data sets of others: a function without arguments that returns (training set, test set).

Each of the two is either a pair (images, labels) of arrays or tensors, or a Dataset: something with ``len`` and with
items (image, label).

    images    uint8 [N, H, W, C], or [N, H, W] for one channel; in a Dataset each uint8 [H, W, C] or [H, W] as an array
              or an image of Pillow, or uint8 [C, H, W] as a tensor
    labels    whole numbers from 0 to classes - 1, of every class at least one in one of the sets

The classes are counted and mean and std are measured here, once, when a recipe is composed.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlth import specs
from fastlth.data import folders
from fastlth.data.sources import Images, Source
from fastlth.errors import DataError
from fastlth.recipe import DataSection


def read(name: str) -> Source:
    """What the function ``name`` returns. Raises RecipeError if it cannot be called, DataError for anything else than
    two sets of images of one size."""
    function = specs.find(name)
    try:
        parts: Any = function()
    except Exception as error:  # of code that is not ours
        raise DataError(f"{name} failed ({type(error).__name__}: {' '.join(str(error).split())})") from error
    if not isinstance(parts, tuple | list) or len(parts) != 2:
        raise DataError(f"{name} returns {_kind(parts)}; it must return (training set, test set)")
    train, test = _images(parts[0], f"the training set of {name}"), _images(parts[1], f"the test set of {name}")
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise DataError(f"{name} gives training images of {_size(train)} and test images of {_size(test)}; "
                        "make them one size")  # fmt: skip
    return Source(name, train, test)


def facts(name: str, image_size: int | None = None) -> dict[str, Any]:
    """The data section of a recipe on data set ``name``: its name and what is measured."""
    if specs.folder(name) is not None:
        return folders.facts(name, image_size)
    return {"name": name, **measured(read(name))}


def load(data: DataSection) -> Source:
    """The images of a recipe. Raises DataError where they are not what they were when it was composed."""
    if specs.folder(data.name) is not None:
        return folders.read(data)
    source = read(data.name)
    if (found := content(source)) != data.content:
        raise DataError(f"{data.name} now gives other images or labels than the recipe's ({found[:8]}, not "
                        f"{str(data.content)[:8]}); restore them, or start a new search")  # fmt: skip
    return source


def measured(source: Source) -> dict[str, Any]:
    """The facts of a data set, by the names of ``recipe.FACTS``. Raises DataError for a set that cannot be learnt."""
    train, test = source.train, source.test
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    if classes < 2 or len(train.labels) < 2:
        raise DataError(f"{source.name} has {classes} classes and {len(train.labels)} training images; "
                        "give two of each")  # fmt: skip
    height, width, channels = train.pixels.shape[1:]
    mean, std = _mean_std(np.asarray(train.pixels))
    return {
        "shape": [channels, height, width], "classes": classes, "train": len(train.labels), "test": len(test.labels),
        "mean": mean, "std": std, "content": content(source),
    }  # fmt: skip


def content(source: Source) -> str:
    """sha256 (hex) over shapes, pixels and labels of both sets."""
    sha = hashlib.sha256()
    for images in (source.train, source.test):
        sha.update(repr(images.pixels.shape).encode())
        sha.update(np.ascontiguousarray(images.pixels).data)
        sha.update(images.labels.astype("<i8").tobytes())
    return sha.hexdigest()


def _mean_std(pixels: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Per channel, of pixels / 255, to four decimals; exact sums, so the same everywhere."""
    levels = np.arange(256, dtype=np.float64) / 255
    means, stds = [], []
    for channel in range(pixels.shape[3]):
        share = np.bincount(pixels[..., channel].reshape(-1), minlength=256) / pixels[..., channel].size
        mean = float(share @ levels)
        means.append(round(mean, 4))
        stds.append(max(round(float(share @ (levels - mean) ** 2) ** 0.5, 4), 0.0001))
    return means, stds


def _images(part: Any, what: str) -> Images:
    if isinstance(part, tuple | list) and len(part) == 2 and getattr(part[0], "ndim", 0) >= 3:
        pixels, labels = (_array(x) for x in part)
    elif hasattr(part, "__len__") and hasattr(part, "__getitem__"):
        pixels, labels = _stacked(part, what)
    else:
        raise DataError(f"{what} is {_kind(part)}; give (images, labels) or a Dataset")
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or not pixels.size:
        raise DataError(f"{what} has images of type {pixels.dtype} and shape {list(pixels.shape)}; "
                        "give uint8 of [N, H, W, C] or [N, H, W]")  # fmt: skip
    if pixels.shape[3] > 16:
        raise DataError(f"{what} has images of {pixels.shape[3]} channels; give uint8 of [N, H, W, C], channels last")
    if labels.dtype.kind not in "iu" or labels.shape != pixels.shape[:1] or labels.min() < 0:
        raise DataError(f"{what} has {len(pixels)} images and labels of type {labels.dtype} and shape "
                        f"{list(labels.shape)}; give one whole number from 0 on for each image")  # fmt: skip
    return Images(np.ascontiguousarray(pixels), labels.astype(np.int64))


def _stacked(dataset: Any, what: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """The items of a Dataset as two arrays."""
    pixels, labels = [], []
    for i in range(len(dataset)):
        try:
            image, label = dataset[i]
        except (TypeError, ValueError):
            raise DataError(f"item {i} of {what} is not (image, label)") from None
        channels_first = hasattr(image, "detach") and image.ndim == 3  # a tensor
        image = _array(image)
        pixels.append(np.moveaxis(image, 0, -1) if channels_first else image)
        labels.append(int(label))
        if pixels[i].dtype != np.uint8 or pixels[i].ndim not in (2, 3):
            raise DataError(f"image {i} of {what} has type {pixels[i].dtype} and shape {list(image.shape)}; give uint8 "
                            "images (leave out transforms such as ToTensor)")  # fmt: skip
        if pixels[i].shape != pixels[0].shape:
            raise DataError(f"image {i} of {what} has shape {list(pixels[i].shape)}, image 0 {list(pixels[0].shape)}; "
                            "make them one size")  # fmt: skip
    if not pixels:
        raise DataError(f"{what} is empty")
    return np.stack(pixels), np.array(labels, dtype=np.int64)


def _array(values: Any) -> NDArray[Any]:
    """An array, tensor or Pillow image as an array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _kind(value: Any) -> str:
    return f"{type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else type(value).__name__


def _size(images: Images) -> str:
    return "x".join(str(n) for n in images.pixels.shape[1:])
