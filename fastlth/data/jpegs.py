"""Photographs in one .beton of FFCV's, as JPEGs, and its decoder.

A JPEG of the folder is stored byte for byte, unless it is too large or not one that FFCV can decode; that, and every
image of another format, is stored as a new JPEG of high quality.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastlth.data import ffcv
from fastlth.data.photos import LARGEST, Photos, opened, photo, workers
from fastlth.errors import DataError, EnvironmentFailure

if TYPE_CHECKING:
    from PIL.Image import Image

QUALITY = 95
SLAB = 512  # photographs that are read before the first of them is written
PAGE = 2**23  # bytes; FFCV's file is made of such pages, and no photograph may be larger than one


class Jpeg(NamedTuple):
    data: NDArray[np.uint8]
    width: int
    height: int


def beton(photos: Photos, labels: NDArray[np.int64], cache: Path) -> Path:
    """The .beton of ``photos`` in ``cache``, written if it is not there or not whole.

    Raises EnvironmentFailure where it cannot be written, DataError for a file that is not an image.
    """
    path = cache / f"{photos.name}-jpegs.beton"
    return ffcv.made(path, labels, lambda file: _write(file, photos, labels), other="pillow")


class Decoder:
    """Decodes photograph i of a .beton by FFCV's part in C, which works outside of Python's lock."""

    def __init__(self, path: Path) -> None:
        reader = ffcv.imported("ffcv.reader").Reader(str(path))
        table = reader.alloc_table
        table = table[np.argsort(table["ptr"])]
        self._entries = reader.metadata["f0"]
        self._sizes = table["size"][np.searchsorted(table["ptr"], self._entries["data_ptr"])]
        self._bytes = np.memmap(path, np.uint8, "r")
        self._path = path

    def __call__(self, i: int) -> Image:
        from PIL import Image

        entry, start = self._entries[i], int(self._entries["data_ptr"][i])
        jpeg = Jpeg(self._bytes[start : start + int(self._sizes[i])], int(entry["width"]), int(entry["height"]))
        pixels = decoded(jpeg)
        if pixels is None:
            raise EnvironmentFailure(f"photograph {i} of {self._path} cannot be decoded; remove that file, which is "
                                     "written anew")  # fmt: skip
        return Image.frombuffer("RGB", (jpeg.width, jpeg.height), pixels, "raw", "RGB", 0, 1)


def decoded(jpeg: Jpeg) -> NDArray[np.uint8] | None:
    """uint8 [height, width, 3] by FFCV, or None where it cannot decode the JPEG."""
    out = np.empty((jpeg.height, jpeg.width, 3), dtype=np.uint8)
    imdecode = ffcv.imported("ffcv.libffcv").imdecode
    return None if imdecode(jpeg.data, out, jpeg.height, jpeg.width, jpeg.height, jpeg.width) else out


def _write(path: Path, photos: Photos, labels: NDArray[np.int64]) -> None:
    field = ffcv.imported("ffcv.fields").RGBImageField(write_mode="jpg")
    field.encode = _store  # the photographs come encoded
    page = max(PAGE, 1 << (64 * photos.size**2 - 1).bit_length())
    ffcv.write(path, field, _jpegs(photos, page), labels, page)


def _store(destination: Any, jpeg: Jpeg, malloc: Any) -> None:
    destination["mode"], destination["width"], destination["height"] = 0, jpeg.width, jpeg.height
    destination["data_ptr"], storage = malloc(jpeg.data.nbytes)
    storage[:] = jpeg.data


def _jpegs(photos: Photos, most: int) -> Iterator[Jpeg]:
    shorter = LARGEST * photos.size
    with ThreadPoolExecutor(workers(), thread_name_prefix="fastlth-decode") as pool:
        for start in range(0, len(photos.files), SLAB):
            yield from pool.map(lambda file: _jpeg(file, shorter, most), photos.files[start : start + SLAB])


def _jpeg(file: Path, shorter: int, most: int) -> Jpeg:
    with opened(file) as image:
        kept = image.format == "JPEG" and image.mode in ("RGB", "L") and min(image.size) <= shorter
        width, height = image.size
        data = np.frombuffer(file.read_bytes() if kept else b"", np.uint8)
    if kept and len(data) <= most and decoded(jpeg := Jpeg(data, width, height)) is not None:
        return jpeg
    scaled, encoded = photo(file, shorter), io.BytesIO()
    scaled.save(encoded, "JPEG", quality=QUALITY, subsampling=0)
    jpeg = Jpeg(np.frombuffer(encoded.getvalue(), np.uint8), *scaled.size)
    if len(jpeg.data) > most or max(scaled.size) > 65535:
        raise DataError(f"{file} takes {len(jpeg.data):,} bytes as a JPEG, too many; scale it down, or remove it")
    return jpeg
