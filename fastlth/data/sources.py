"""Data sets as uint8 arrays: found, checked, and downloaded where they are not there yet.

    mnist           ROOT/MNIST/raw/*               torchvision reads and downloads it
    fashion-mnist   ROOT/FashionMNIST/raw/*        likewise
    cifar-10        ROOT/cifar-10-batches-py/*     likewise; cifar-10a and cifar-10b are its halves
    cifar-100       ROOT/cifar-100-python/*        likewise
    svhn            ROOT/svhn/*.mat                likewise
    digits          part of scikit-learn           every fifth image is a test image

Every file is compared with its known size and md5 before it is read (CIFAR's files are pickles; of Fashion-MNIST
sizes alone are known, and its files are plain numbers).
A set whose files are complete is only ever read; a download appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlth.catalogue import dataset_name
from fastlth.data.photos import Photos
from fastlth.errors import DataError
from fastlth.recipe import DataSection


class Rows:
    """Some images of a set that is in files, read when they are asked for: ``set[indices]``, later."""

    def __init__(self, pixels: NDArray[np.uint8] | Photos, indices: NDArray[np.int64]) -> None:
        self._pixels, self._indices = pixels, indices
        self.shape = (len(indices), *pixels.shape[1:])

    def __getitem__(self, places: slice | NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        rows: NDArray[np.uint8] = self._pixels[self._indices[places]]
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)


Pixels = NDArray[np.uint8] | Rows | Photos


@dataclass(frozen=True)
class Images:
    """The images of a split and their labels, 0 to classes - 1."""

    pixels: Pixels
    """[N, H, W, C]"""
    labels: NDArray[np.int64]
    """[N]"""
    name: str = ""
    """of images that are mapped from a file: what their content is known by, so that nobody has to read them all"""


@dataclass(frozen=True)
class Source:
    """A data set as it comes: its training and its test images."""

    name: str
    train: Images
    test: Images


@dataclass(frozen=True)
class File:
    name: str
    size: int | None
    md5: str | None
    """None: not known"""


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
    "cifar-100": Files("cifar-100-python", (
        File("train", 155_249_918, "16019d7e3df5f24257cddd939b257f8d"),
        File("test", None, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
        File("meta", None, "7973b15100ade9c7d40fb424638fde48"),
    )),
    "fashion-mnist": Files("FashionMNIST/raw", (
        File("train-images-idx3-ubyte", 47_040_016, None),
        File("train-labels-idx1-ubyte", 60_008, None),
        File("t10k-images-idx3-ubyte", 7_840_016, None),
        File("t10k-labels-idx1-ubyte", 10_008, None),
    )),
    "svhn": Files("svhn", (
        File("train_32x32.mat", 182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373"),
        File("test_32x32.mat", 64_275_384, "eb5a983be6a315427106f1b164d9cef3"),
    )),
    "digits": Files(".", ()),
}  # fmt: skip

PARTS = {"cifar-10a": "cifar-10", "cifar-10b": "cifar-10"}
"""sets that are part of another one's files"""


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
    table = tables[PARTS.get(name, name)]
    if _problem(table, root) == "missing":
        if not download:
            raise DataError(f"{name} is not in {root / table.folder}; {_where(table, root)}")
        _download(PARTS.get(name, name), table, root)
    problem = _problem(table, root) or _damage(table, root)
    if problem:
        raise DataError(
            f"{problem}; remove {root / table.folder} to have {name} downloaded again, or {_where(table, root)}"
        )
    train, test = READERS[name](root)
    return Source(name, train, test)


def load_for(data: DataSection, data_dir: str | Path | None = None) -> Source:
    """The images of a recipe: ``load`` for a set of the catalogue, else those of the function or folder it names.

    ``data_dir`` as for ``data_root``. Raises also DataError where these are not what they were when the recipe was
    composed.
    """
    if not data.own:
        return load(data.name, data_root(Path(data_dir) if data_dir else None))
    from fastlth.data import own

    return own.load(data)


def state(name: str, root: Path, tables: Mapping[str, Files] = FILES) -> str:
    """ "ready", "missing" or "damaged: <what>", from file sizes alone; nothing is read."""
    name = dataset_name(name)
    problem = _problem(tables[PARTS.get(name, name)], root)
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
        if file.size not in (None, sizes[file]):
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
        if file.md5 not in (None, found):
            return f"{path} has the md5 sum {found} instead of {file.md5}"
    return ""


def _download(name: str, table: Files, root: Path) -> None:
    """Fetch a set into a temporary folder, check it, move it into place; on failure leave nothing behind."""
    import torchvision.datasets as sets

    def svhn(folder: str, download: bool) -> None:
        for split in ("train", "test"):
            sets.SVHN(Path(folder) / "svhn", split, download=download)

    fetch: dict[str, Any] = {"mnist": sets.MNIST, "fashion-mnist": sets.FashionMNIST, "cifar-10": sets.CIFAR10,
                             "cifar-100": sets.CIFAR100, "svhn": svhn}  # fmt: skip
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


def _mnist(root: Path, folder: str = "MNIST") -> tuple[Images, Images]:
    # Not through torchvision's MNIST class: it prefers old processed/*.pt files, which nobody checks.
    from torchvision.datasets.mnist import read_image_file, read_label_file

    def read(part: str) -> Images:
        raw = root / folder / "raw"
        pixels = read_image_file(raw / f"{part}-images-idx3-ubyte").numpy()
        return Images(pixels[..., None], read_label_file(raw / f"{part}-labels-idx1-ubyte").numpy())

    return read("train"), read("t10k")


def _cifar(root: Path, kind: str = "CIFAR10") -> tuple[Images, Images]:
    import torchvision.datasets as sets

    def read(train: bool) -> Images:
        part = getattr(sets, kind)(root, train=train, download=False)
        return Images(np.ascontiguousarray(part.data), np.array(part.targets, dtype=np.int64))

    return read(True), read(False)


def _half(root: Path, second: bool) -> tuple[Images, Images]:
    """Half of CIFAR-10's training images: of each class the first half in the order of the files, or the second."""
    train, test = _cifar(root)
    later = np.zeros(len(train.labels), bool)
    for label in np.unique(train.labels):
        places = np.flatnonzero(train.labels == label)
        later[places[len(places) // 2 :]] = True
    return Images(train.pixels[later == second], train.labels[later == second]), test


def _svhn(root: Path) -> tuple[Images, Images]:
    from torchvision.datasets import SVHN

    def read(split: str) -> Images:
        part = SVHN(root / "svhn", split, download=False)
        return Images(np.ascontiguousarray(part.data.transpose(0, 2, 3, 1)), part.labels.astype(np.int64))

    return read("train"), read("test")


def _digits(root: Path) -> tuple[Images, Images]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 0
    return Images(pixels[~test], labels[~test]), Images(pixels[test], labels[test])


READERS: dict[str, Callable[[Path], tuple[Images, Images]]] = {
    "mnist": _mnist,
    "fashion-mnist": lambda root: _mnist(root, "FashionMNIST"),
    "cifar-10": _cifar,
    "cifar-10a": lambda root: _half(root, second=False),
    "cifar-10b": lambda root: _half(root, second=True),
    "cifar-100": lambda root: _cifar(root, "CIFAR100"),
    "svhn": _svhn,
    "digits": _digits,
}
