"""Fashion-MNIST, CIFAR-100, SVHN and the halves of CIFAR-10, from small files in the right formats."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as sets

from fastlth.catalogue import DATASETS, dataset_name
from fastlth.composition import compose
from fastlth.data.sources import FILES, PARTS, File, Files, load, load_for, state
from fastlth.errors import DataError


def put(root: Path, folder: str, contents: dict[str, bytes]) -> Files:
    (root / folder).mkdir(parents=True)
    for name, content in contents.items():
        (root / folder / name).write_bytes(content)
    return Files(folder, tuple(File(n, len(c), hashlib.md5(c).hexdigest()) for n, c in contents.items()))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def cifar(root: Path, monkeypatch: pytest.MonkeyPatch, kind: str, labels: dict[str, list[int]]) -> np.ndarray:
    """Files of CIFAR-10 or CIFAR-100 with these labels; the pixels of all training images [N, 32, 32, 3]."""
    rng = np.random.default_rng(0)
    key, cls = ("labels", sets.CIFAR10) if kind == "cifar-10" else ("fine_labels", sets.CIFAR100)
    planes = {name: rng.integers(0, 256, (len(of), 3072), dtype=np.uint8) for name, of in labels.items()}
    contents = {name: pickle.dumps({"data": planes[name], key: of}) for name, of in labels.items()}
    meta = cls.meta["filename"]
    contents[meta] = pickle.dumps({cls.meta["key"]: [str(i) for i in range(100)]})
    table = put(root, cls.base_folder, contents)
    sums = [[f.name, f.md5] for f in table.files]
    test = [s for s in sums if s[0].startswith("test")]
    monkeypatch.setattr(cls, "train_list", [s for s in sums if s not in test and s[0] != meta])
    monkeypatch.setattr(cls, "test_list", test)
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": dict(map(tuple, sums))[meta]})
    monkeypatch.setitem(FILES, kind, table)
    every = np.concatenate([p for name, p in planes.items() if not name.startswith("test")])
    return every.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def test_what_is_known_of_the_files_is_what_torchvision_knows() -> None:
    cls = sets.CIFAR100
    sums = [*cls.train_list, *cls.test_list, [cls.meta["filename"], cls.meta["md5"]]]
    assert [[f.name, f.md5] for f in FILES["cifar-100"].files] == sums
    assert FILES["cifar-100"].folder == cls.base_folder
    svhn = {name: md5 for split, (_, name, md5) in ((k, v) for k, v in sets.SVHN.split_list.items() if k != "extra")}
    assert {f.name: f.md5 for f in FILES["svhn"].files} == svhn
    assert [f.name for f in FILES["fashion-mnist"].files] == [Path(n).stem for n, _ in sets.FashionMNIST.resources]
    for split, file in (("train", 0), ("test", 2)):  # 16 bytes of header, then one per pixel
        images = getattr(DATASETS["fashion-mnist"], split)
        assert FILES["fashion-mnist"].files[file].size == 16 + images * 28 * 28
        assert FILES["fashion-mnist"].files[file + 1].size == 8 + images


def test_fashion_mnist_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.arange(5 * 28 * 28).reshape(5, 28, 28).astype(np.uint8)
    table = put(tmp_path, "FashionMNIST/raw", {
        "train-images-idx3-ubyte": idx(pixels[:3]), "train-labels-idx1-ubyte": idx(np.array([9, 0, 4], np.uint8)),
        "t10k-images-idx3-ubyte": idx(pixels[3:]), "t10k-labels-idx1-ubyte": idx(np.array([1, 2], np.uint8)),
    })  # fmt: skip
    source = load("fmnist", tmp_path, tables={"fashion-mnist": table})
    assert (source.name, source.train.labels.tolist()) == ("fashion-mnist", [9, 0, 4])
    assert source.test.labels.tolist() == [1, 2]
    assert np.array_equal(np.concatenate([source.train.pixels, source.test.pixels])[..., 0], pixels)
    sizes = tuple(File(f.name, f.size, None) for f in table.files)
    monkeypatch.setitem(FILES, "fashion-mnist", Files(table.folder, sizes))
    assert state("fashion-mnist", tmp_path) == "ready"
    (tmp_path / table.folder / "t10k-labels-idx1-ubyte").write_bytes(b"short")
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte has 5 bytes instead of 10"):
        load("fashion-mnist", tmp_path)


def test_cifar_100_is_read_with_its_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = cifar(tmp_path, monkeypatch, "cifar-100", {"train": [99, 3, 50], "test": [7, 0]})
    source = load("cifar100", tmp_path)
    assert source.train.labels.tolist() == [99, 3, 50] and source.test.labels.tolist() == [7, 0]
    assert np.array_equal(source.train.pixels, pixels)


def test_svhn_is_read_with_its_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    rng, parts = np.random.default_rng(0), {}
    (tmp_path / "svhn").mkdir()
    for split, labels in (("train", [10, 1, 9]), ("test", [10, 4])):
        pixels = rng.integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
        file = tmp_path / "svhn" / f"{split}_32x32.mat"
        savemat(file, {"X": pixels, "y": np.array(labels, np.uint8)[:, None]})
        parts[split] = (pixels, File(file.name, file.stat().st_size, hashlib.md5(file.read_bytes()).hexdigest()))
    monkeypatch.setattr(sets.SVHN, "split_list", {s: ["", f.name, f.md5] for s, (_, f) in parts.items()})
    monkeypatch.setitem(FILES, "svhn", Files("svhn", tuple(f for _, f in parts.values())))
    source = load("svhn", tmp_path)
    assert source.train.labels.tolist() == [0, 1, 9], "SVHN writes 10 for the digit 0"
    assert source.test.labels.tolist() == [0, 4]
    assert source.train.pixels.shape == (3, 32, 32, 3)
    assert np.array_equal(source.train.pixels, parts["train"][0].transpose(3, 0, 1, 2))


def test_the_halves_of_cifar_10_are_a_partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {f"data_batch_{i}": [(i * j) % 3 for j in range(12)] for i in range(1, 6)} | {"test_batch": [1, 2]}
    pixels = cifar(tmp_path, monkeypatch, "cifar-10", labels)
    every = np.array([x for name, of in labels.items() if name != "test_batch" for x in of])
    first, second = [], []
    for i, label in enumerate(every):  # the definition, image by image
        seen = int((every[:i] == label).sum())
        (first if seen < int((every == label).sum()) // 2 else second).append(i)
    for name, expected in (("cifar-10a", first), ("cifar10b", second)):
        source = load(name, tmp_path)
        assert source.name == dataset_name(name)
        assert np.array_equal(source.train.pixels, pixels[expected])
        assert source.train.labels.tolist() == every[expected].tolist()
        assert source.test.labels.tolist() == [1, 2]
    assert {dataset_name(n) for n in PARTS} == {"cifar-10a", "cifar-10b"}
    assert state("cifar-10b", tmp_path) == "ready"


@pytest.mark.parametrize(("name", "classes", "shape"), [
    ("fashion-mnist", 10, (1, 28, 28)), ("cifar-100", 100, (3, 32, 32)), ("svhn", 10, (3, 32, 32)),
    ("cifar-10a", 10, (3, 32, 32)),
])  # fmt: skip
def test_every_set_makes_a_recipe(name: str, classes: int, shape: tuple[int, int, int], tmp_path: Path) -> None:
    settings = {"train.iterations": 9, "train.batch_size": 8, "train.lr": 0.1}
    recipe = compose("lenet-5", name, settings=settings).recipe
    facts = recipe.data.facts
    assert (facts.classes, facts.shape) == (classes, shape)
    assert len(facts.mean) == len(facts.std) == shape[0]
    with pytest.raises(DataError, match=f"{name} is not in|could not download"):
        load(name, tmp_path, download=False)
    assert recipe.to_dict()["data"].keys() == {"name", "validation", "normalise", "augment"}, "facts are not repeated"
    assert load_for(compose("lenet-300-100", "digits", settings=settings).recipe.data).name == "digits"
