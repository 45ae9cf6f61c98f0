"""Folders of images: ``PATH/train/<class>/*`` and ``PATH/val/<class>/*`` (or ``test``), decoded once.

Every image becomes a square of ``data.image_size`` pixels: its shorter side is scaled to that many (Pillow, bilinear),
then the middle is cut out. The squares lie in .npy files in the cache, written once and mapped into memory from then
on, so a training reads no JPEG; random crops and flips are ``data.augment``'s, on the device, by seed. Only photo-crop
trains on the photographs themselves (photos.py); held-out and test images are squares then too.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from fastlth import specs
from fastlth.data.photos import Photos, opened
from fastlth.data.sources import Images, Source
from fastlth.errors import DataError, EnvironmentFailure
from fastlth.recipe import DataSection

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
IMAGE_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as everybody takes them for photographs


@dataclass(frozen=True)
class Split:
    folder: Path
    files: tuple[tuple[str, int], ...]
    """(path below ``folder``, bytes) of every image; any first part has all classes in their proportions"""
    classes: tuple[str, ...]

    @property
    def labels(self) -> NDArray[np.int64]:
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number[file.split("/", 1)[0]] for file, _ in self.files], dtype=np.int64)

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name, _ in self.files]


def facts(name: str, image_size: int | None = None) -> dict[str, Any]:
    """The data section of a recipe on ``imagefolder:PATH``, by names and sizes of files alone. Raises DataError."""
    root = Path(specs.folder(name) or "").expanduser().resolve()
    train, test = scan(root)
    size = image_size or IMAGE_SIZE
    return {
        "name": f"{specs.FOLDER}{root}", "shape": [3, size, size], "classes": len(train.classes),
        "train": len(train.files), "test": len(test.files), "mean": list(MEAN), "std": list(STD),
        "content": content(train, test), **({"image_size": image_size} if image_size else {}),
    }  # fmt: skip


def scan(root: Path) -> tuple[Split, Split]:
    """Training and test images of a folder. Raises DataError, in one sentence, where it is not laid out so."""
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or held_out is None:
        raise DataError(f"{root} must hold the folders train and val (or test), each with a folder per class; "
                        "make them, or give another PATH")  # fmt: skip
    train, test = (Split(folder, *_files(folder)) for folder in (root / "train", held_out))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"{train.folder} and {test.folder} must hold the same classes, but these are in one of them "
                        f"only: {', '.join(odd[:5])}")  # fmt: skip
    return train, test


def content(train: Split, test: Split) -> str:
    """sha256 (hex) over the names and sizes of all files; their bytes are not read, which would take hours."""
    sha = hashlib.sha256()
    for split in (train, test):
        for name, size in split.files:
            sha.update(f"{name}\0{size}\n".encode())
        sha.update(b"\n")
    return sha.hexdigest()


def read(data: DataSection, cache: Path | None = None) -> Source:
    """The images of a recipe, mapped into memory. Raises DataError for another content than the recipe's or a file
    that is not an image, EnvironmentFailure where the cache cannot be written."""
    root = Path(specs.folder(data.name) or "")
    train, test = scan(root)
    if (found := content(train, test)) != data.content:
        raise DataError(f"{root} holds other files than the recipe's ({found[:8]}, not {str(data.content)[:8]}); "
                        "restore them, or start a new search")  # fmt: skip
    size = data.facts.shape[1]
    if cache is None:
        import platformdirs

        cache = Path(platformdirs.user_cache_dir("fastlth")) / "folders"
    parts = []
    for what, split in (("train", train), ("test", test)):
        name = f"{found[:16]}-{size}-{what}"
        if (what, data.augment) == ("train", "photo-crop"):
            parts.append(Images(_photos(split, size, name, cache), split.labels, name))
        else:
            parts.append(Images(_squares(cache / f"{name}.npy", split.paths, size), split.labels, name))
    return Source(data.name, parts[0], parts[1])


def _photos(split: Split, size: int, name: str, cache: Path) -> Photos:
    files = split.paths

    def squares(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        which = hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()[:16]
        return _squares(cache / f"{name}-{which}.npy", [files[i] for i in indices], size)

    return Photos(files, size, name, squares)


def _files(folder: Path) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    found: list[tuple[float, int, tuple[str, int]]] = []
    for number, name in enumerate(classes):
        mine = [(f"{name}/{below}", size) for below, size in _walk(folder / name)]
        if not mine:
            raise DataError(f"{folder / name} holds no image ({', '.join(ENDINGS)}); remove it, or put some there")
        found += [(i / len(mine), number, file) for i, file in enumerate(mine)]
    if len(classes) < 2:
        raise DataError(f"{folder} holds {len(classes)} folders of classes; it needs at least two")
    # the first images of a set, which may be all that is measured, are of every class
    return tuple(file for _, _, file in sorted(found)), tuple(classes)


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir():
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/")
        elif entry.name.lower().endswith(ENDINGS):
            yield f"{prefix}{entry.name}", entry.stat().st_size


def _squares(path: Path, files: Sequence[Path], size: int) -> NDArray[np.uint8]:
    """The middles of some images [N, size, size, 3] from the file ``path``, which is written if it is not there."""
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not path.is_file():
                    _write(path, files, size)
        pixels: NDArray[np.uint8] = np.load(path, mmap_mode="c")  # copy on write: torch wants to be able to write
    except OSError as error:
        needs = len(files) * size * size * 3 / 2**30
        raise EnvironmentFailure(f"cannot write {path} ({error.strerror}); it takes {needs:.1f} GiB") from None
    return pixels


def _write(path: Path, files: Sequence[Path], size: int) -> None:
    with tempfile.TemporaryDirectory(prefix=".folder-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        squares = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(files), size, size, 3))
        with ThreadPoolExecutor(thread_name_prefix="fastlth-decode") as pool:  # Pillow decodes outside of the GIL
            for i, pixels in enumerate(pool.map(lambda file: square(file, size), files)):
                squares[i] = pixels
        squares.flush()
        del squares
        os.replace(temporary, path)


def square(file: Path, size: int) -> NDArray[np.uint8]:
    """The middle of the image in a file: uint8 [size, size, 3]. Raises DataError."""
    from PIL.Image import Resampling

    with opened(file) as stored:
        stored.draft("RGB", (size, size))  # JPEG: decodes at the smallest scale that is large enough
        image = stored.convert("RGB")
    scale = size / min(image.size)
    width, height = (max(size, round(n * scale)) for n in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return np.asarray(image)
