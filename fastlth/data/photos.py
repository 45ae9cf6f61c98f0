"""Photographs decoded anew for every batch, each cut to a random rectangle: ``data.augment`` photo-crop.

Where the rectangle lies is a function of (seed, epoch, place in the epoch's order) and of the photograph's size, so a
resumed training sees the same crops and no loader has a state to save. FFCV's own pipeline cannot give that: its crops
come from numba's generator, and a compiled decoder is told neither the epoch nor the place. So FFCV's file and its
decoder are used from here (jpegs.py); without FFCV, Pillow decodes the files of the folder. Both ways cut by ``crop``,
so they differ by the rounding of their decoders alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastlth.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 2  # times the image size: what the shorter side of a photograph is scaled down to
Decode = Callable[[int], "Image"]
"""number of a photograph -> RGB, its shorter side at most LARGEST times the image size"""
Words = tuple[int, int, int, int]


def box(words: Words, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a rectangle within ``width`` x ``height`` pixels: 8 to 100 % of the area at aspect
    ratios 3/4 to 4/3 (Szegedy et al. 2015), sides cut to the photograph's where torchvision draws again.

    words: four of 32 bits; the lowest bit of the last one is left for the mirror.
    """
    area = (0.08 + 0.92 * words[0] / 2**32) * width * height
    ratio = 0.75 * (16 / 9) ** (words[1] / 2**32)
    across = min(width, max(1, round(math.sqrt(area * ratio))))
    down = min(height, max(1, round(math.sqrt(area / ratio))))
    left = words[2] * (width - across + 1) >> 32
    top = (words[3] >> 1) * (height - down + 1) >> 31
    return left, top, left + across, top + down


def crop(photo: Image, words: Words, size: int) -> NDArray[np.uint8]:
    """The rectangle that ``words`` choose, scaled to uint8 [size, size, 3] (Pillow's bilinear, which averages where it
    shrinks), every second one mirrored."""
    from PIL.Image import Resampling

    square = np.asarray(photo.crop(box(words, *photo.size)).resize((size, size), Resampling.BILINEAR))
    return square[:, ::-1] if words[3] & 1 else square


@contextmanager
def opened(file: Path) -> Iterator[Image]:
    """The image in a file, not decoded yet. Raises DataError for whatever goes wrong with it, then or later."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} is not an image that can be read ({error}); remove or replace it") from None


def photo(file: Path, shorter: int) -> Image:
    """The photograph in a file as RGB, scaled down where its shorter side has more than ``shorter`` pixels.

    As everywhere with folders of images, EXIF's orientation is not looked at. Raises DataError.
    """
    from PIL.Image import Resampling

    with opened(file) as stored:
        scale = min(1.0, shorter / min(stored.size))
        width, height = (max(1, round(n * scale)) for n in stored.size)
        stored.draft("RGB", (width, height))  # JPEG: decodes at the smallest scale that is large enough
        image = stored.convert("RGB")
    return image if image.size == (width, height) else image.resize((width, height), Resampling.BILINEAR)


class Photos:
    """The photographs of a split, in place of their pixels: what is asked for by index comes as central squares."""

    def __init__(self, files: Sequence[Path], size: int, name: str,
                 squares: Callable[[NDArray[np.int64]], NDArray[np.uint8]]) -> None:  # fmt: skip
        """``name`` is what their content is known by; ``squares`` gives the middles [N, size, size, 3] of those at some
        indices, from a file that is written once."""
        self.files, self.size, self.name, self.squares = files, size, name, squares
        self.shape = (len(files), size, size, 3)

    def __getitem__(self, places: slice | NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        from fastlth.data.folders import square

        chosen = np.arange(len(self.files))[places]
        out = np.empty((len(chosen), *self.shape[1:]), dtype=np.uint8)
        with ThreadPoolExecutor(workers(), thread_name_prefix="fastlth-decode") as pool:
            for row, pixels in zip(out, pool.map(lambda i: square(self.files[i], self.size), chosen), strict=True):
                row[:] = pixels
        return out

    def decode(self, i: int) -> Image:
        """Photograph ``i`` of the folder, by Pillow."""
        return photo(self.files[i], LARGEST * self.size)


def workers() -> int:
    """Threads that decode; Pillow and FFCV do so outside of Python's lock."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
