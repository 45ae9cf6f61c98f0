"""Data sets as uint8 arrays: found, checked, and downloaded where they are not there yet.

    mnist      ROOT/MNIST/raw/*               torchvision reads and downloads it
    cifar-10   ROOT/cifar-10-batches-py/*     torchvision reads and downloads it
    digits     part of scikit-learn           every fifth image is a test image

Every file is compared with its known size and md5 before it is read (CIFAR-10's files are pickles).
A set whose files are complete is only ever read; a download appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlth.catalogue import dataset_name
from fastlth.errors import DataError


@dataclass(frozen=True)
class Images:
    pixels: NDArray[np.uint8]
    """[N, H, W, C]"""
    labels: NDArray[np.int64]
    """[N]"""


@dataclass(frozen=True)
class Source:
    name: str
    train: Images
    test: Images


@dataclass(frozen=True)
class File:
    name: str
    size: int
    md5: str


@dataclass(frozen=True)
class Files:
    """What a set consists of on disk: ``folder`` below the data root and the files in it."""

    folder: str
    files: tuple[File, ...]


FILES: dict[str, Files] = {
    "mnist": Files("MNIST/raw", (
        File("train-images-idx3-ubyte", 47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
        File("train-labels-idx1-ubyte", 60_008, "a25bea736e30d166cdddb491f175f624"),
        File("t10k-images-idx3-ubyte", 7_840_016, "2646ac647ad5339dbf082846283269ea"),
        File("t10k-labels-idx1-ubyte", 10_008, "27ae3e4e09519cfbb04c329615203637"),
    )),
    "cifar-10": Files("cifar-10-batches-py", (
        File("data_batch_1", 31_035_704, "c99cafc152244af753f735de768cd75f"),
        File("data_batch_2", 31_035_320, "d4bba439e000b95fd0a9bffe97cbabec"),
        File("data_batch_3", 31_035_999, "54ebc095f3ab1f0389bbae665268c751"),
        File("data_batch_4", 31_035_696, "634d18415352ddfa80567beed471001a"),
        File("data_batch_5", 31_035_623, "482c414d41f54cd18b22e5b47cb7c3cb"),
        File("test_batch", 31_035_526, "40351d587109b95175f43aff81a1287e"),
        File("batches.meta", 158, "5ff9c542aee3614f3951f8cda6e48888"),
    )),
    "digits": Files(".", ()),
}  # fmt: skip


def data_root(explicit: Path | None = None) -> Path:
    """The folder that holds the data sets: as told, else $FASTLTH_DATA, else the user's cache folder."""
    if explicit is not None:
        return explicit
    if told := os.environ.get("FASTLTH_DATA"):
        return Path(told).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("fastlth")) / "data"


def load(name: str, root: Path, download: bool = True, tables: Mapping[str, Files] = FILES) -> Source:
    """The training and test images of a data set, in the order of its files.

    Raises RecipeError for an unknown name and DataError where a file is missing or damaged, or where
    nothing of the set is there and it cannot be (or, without ``download``, may not be) downloaded.
    """
    name = dataset_name(name)
    table = tables[name]
    if _problem(table, root) == "missing":
        if not download:
            raise DataError(f"{name} is not in {root / table.folder}; {_where(table, root)}")
        _download(name, table, root)
    problem = _problem(table, root) or _damage(table, root)
    if problem:
        raise DataError(
            f"{problem}; remove {root / table.folder} to have {name} downloaded again, or {_where(table, root)}"
        )
    train, test = READERS[name](root)
    return Source(name, train, test)


def state(name: str, root: Path, tables: Mapping[str, Files] = FILES) -> str:
    """ "ready", "missing" or "damaged: <what>", from file sizes alone; nothing is read."""
    problem = _problem(tables[dataset_name(name)], root)
    if problem in ("", "missing"):
        return problem or "ready"
    return f"damaged: {problem}"


def _where(table: Files, root: Path) -> str:
    return f"put its files into {root / table.folder} or set FASTLTH_DATA to the folder that has {table.folder}"


def _problem(table: Files, root: Path) -> str:
    """ "" if all files have their sizes, "missing" if there is none, else a clause naming the first bad one."""
    folder = root / table.folder
    try:
        sizes = {f: (folder / f.name).stat().st_size for f in table.files if (folder / f.name).is_file()}
    except OSError as error:
        raise DataError(f"cannot read {folder} ({error.strerror}); {_where(table, root)}") from None
    if table.files and not sizes:
        return "missing"
    for file in table.files:
        if file not in sizes:
            return f"{folder / file.name} is missing"
        if sizes[file] != file.size:
            return f"{folder / file.name} has {sizes[file]} bytes instead of {file.size}"
    return ""


def _damage(table: Files, root: Path) -> str:
    """ "" if all files have their md5, else a clause naming the first that has not. CIFAR-10: 0.4 s."""
    for file in table.files:
        path = root / table.folder / file.name
        try:
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        if found != file.md5:
            return f"{path} has the md5 sum {found} instead of {file.md5}"
    return ""


def _download(name: str, table: Files, root: Path) -> None:
    """Fetch a set into a temporary folder, check it, move it into place; on failure leave nothing behind."""
    import torchvision.datasets as sets

    fetch: dict[str, Any] = {"mnist": sets.MNIST, "cifar-10": sets.CIFAR10}
    final = root / table.folder
    try:
        with _folders(final.parent), tempfile.TemporaryDirectory(prefix=f".{name}-", dir=final.parent) as temporary:
            with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the program's results
                fetch[name](temporary, download=True)
            problem = _problem(table, Path(temporary)) or _damage(table, Path(temporary))
            if problem:
                raise RuntimeError(problem)
            for archive in (Path(temporary) / table.folder).glob("*.gz"):
                archive.unlink()
            os.replace(Path(temporary) / table.folder, final)
    except (OSError, RuntimeError, HTTPException) as error:
        if not _problem(table, root):
            return  # another process was faster
        reason = " ".join(str(error).split())
        raise DataError(f"could not download {name} ({reason}); {_where(table, root)}") from None


@contextlib.contextmanager
def _folders(path: Path) -> Iterator[None]:
    """``path`` exists inside the block; if the block fails, the folders made for it are gone again."""
    made = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _mnist(root: Path) -> tuple[Images, Images]:
    # Not through torchvision's MNIST class: it prefers old processed/*.pt files, which nobody checks.
    from torchvision.datasets.mnist import read_image_file, read_label_file

    def read(part: str) -> Images:
        raw = root / "MNIST" / "raw"
        pixels = read_image_file(raw / f"{part}-images-idx3-ubyte").numpy()
        return Images(pixels[..., None], read_label_file(raw / f"{part}-labels-idx1-ubyte").numpy())

    return read("train"), read("t10k")


def _cifar(root: Path) -> tuple[Images, Images]:
    from torchvision.datasets import CIFAR10

    def read(train: bool) -> Images:
        part = CIFAR10(root, train=train, download=False)
        return Images(np.ascontiguousarray(part.data), np.array(part.targets, dtype=np.int64))

    return read(True), read(False)


def _digits(root: Path) -> tuple[Images, Images]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 0
    return Images(pixels[~test], labels[~test]), Images(pixels[test], labels[test])


READERS = {"mnist": _mnist, "cifar-10": _cifar, "digits": _digits}
