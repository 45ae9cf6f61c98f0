"""Data sets: read right, checked before they are read, and downloaded whole or not at all."""

import hashlib
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets
from sklearn.datasets import load_digits

from fastlth.catalogue import DATASETS
from fastlth.data.sources import FILES, PARTS, File, Files, data_root, load, state
from fastlth.errors import DataError, RecipeError

Tables = dict[str, Files]


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def put(root: Path, folder: str, contents: dict[str, bytes]) -> Files:
    (root / folder).mkdir(parents=True)
    for name, content in contents.items():
        (root / folder / name).write_bytes(content)
    return Files(folder, tuple(File(n, len(c), hashlib.md5(c).hexdigest()) for n, c in contents.items()))


def small_mnist(root: Path) -> Tables:
    pixels = np.arange(5 * 28 * 28).reshape(5, 28, 28).astype(np.uint8)
    return {"mnist": put(root, "MNIST/raw", {
        "train-images-idx3-ubyte": idx(pixels[:3]), "train-labels-idx1-ubyte": idx(np.array([7, 0, 9], np.uint8)),
        "t10k-images-idx3-ubyte": idx(pixels[3:]), "t10k-labels-idx1-ubyte": idx(np.array([1, 2], np.uint8)),
    })}  # fmt: skip


def snapshot(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*")}


def test_the_file_table_is_torchvisions() -> None:
    cifar = torchvision.datasets.CIFAR10
    sums = [*cifar.train_list, *cifar.test_list, [cifar.meta["filename"], cifar.meta["md5"]]]
    assert [[f.name, f.md5] for f in FILES["cifar-10"].files] == sums
    assert FILES["cifar-10"].folder == cifar.base_folder
    resources = [Path(url).stem for url, _ in torchvision.datasets.MNIST.resources]
    assert [f.name for f in FILES["mnist"].files] == resources
    assert set(FILES) | set(PARTS) == set(DATASETS)


def test_mnist_is_read_from_its_files(tmp_path: Path) -> None:
    source = load("mnist", tmp_path, tables=small_mnist(tmp_path))
    assert source.name == "mnist"
    assert source.train.pixels.shape == (3, 28, 28, 1)
    assert source.test.pixels.shape == (2, 28, 28, 1)
    assert source.train.pixels.dtype == np.uint8
    assert source.train.labels.dtype == np.int64
    assert source.train.labels.tolist() == [7, 0, 9]
    assert source.test.labels.tolist() == [1, 2]
    both = np.concatenate([source.train.pixels, source.test.pixels])
    assert both.reshape(-1).tolist() == [i % 256 for i in range(5 * 28 * 28)]


def test_cifar_10_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planes = np.random.default_rng(0).integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    contents = {n: pickle.dumps({"data": planes[i], "labels": [i, i + 1]}) for i, n in enumerate(names)}
    contents["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    table = put(tmp_path, "cifar-10-batches-py", contents)
    sums = [[f.name, f.md5] for f in table.files]
    cifar = torchvision.datasets.CIFAR10  # which checks once more, by its own lists
    monkeypatch.setattr(cifar, "train_list", sums[:5])
    monkeypatch.setattr(cifar, "test_list", sums[5:6])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": sums[6][1]})
    source = load("cifar10", tmp_path, tables={"cifar-10": table})
    assert source.name == "cifar-10"
    assert source.train.labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert source.test.labels.tolist() == [5, 6]
    assert source.train.pixels.shape == (10, 32, 32, 3)
    assert source.train.pixels.flags.c_contiguous
    for i, y, x, c in ((0, 0, 0, 0), (3, 31, 2, 1), (9, 5, 31, 2)):
        assert source.train.pixels[i, y, x, c] == planes[i // 2, i % 2, 1024 * c + 32 * y + x]


def test_digits_need_no_files(tmp_path: Path) -> None:
    source = load("digits", tmp_path / "nowhere", download=False)
    digits = load_digits()
    facts = DATASETS["digits"]
    assert (len(source.train.labels), len(source.test.labels)) == (facts.train, facts.test)
    assert source.test.labels.tolist() == digits.target[::5].tolist()
    assert source.train.labels[:5].tolist() == [1, 2, 3, 4, 6]
    assert source.train.pixels.shape[1:] == (8, 8, 1)
    levels = {int(v): round(v * 255 / 16) for v in range(17)}
    assert source.test.pixels[1, :, :, 0].tolist() == [[levels[int(v)] for v in row] for row in digits.images[5]]
    assert state("digits", tmp_path / "nowhere") == "ready"
    assert not (tmp_path / "nowhere").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "says"), [
    (Path.unlink, "is missing"), (cut, r"has \d+ bytes instead of \d+"), (flip, "has the md5 sum .* instead of"),
])  # fmt: skip
@pytest.mark.parametrize("file", [f.name for f in FILES["mnist"].files])
def test_a_bad_file_is_named(
    file: str, damage: Callable[[Path], None], says: str, tmp_path: Path, no_network: list[str]
) -> None:
    tables = small_mnist(tmp_path)
    damage(tmp_path / "MNIST" / "raw" / file)
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match=rf"{file} {says}.*; remove .* or put its files into .* FASTLTH_DATA") as caught:
        load("mnist", tmp_path, tables=tables)
    assert caught.value.exit_code == 4
    assert snapshot(tmp_path) == before
    assert no_network == []  # what a user has put there is never replaced behind his back
    known = state("mnist", tmp_path, tables)
    assert known == "ready" if damage is flip else known.startswith("damaged: ") and file in known


def test_a_damaged_pickle_is_never_opened(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    evil = b"cos\nmkdir\n(V" + str(trap).encode() + b"\ntR."
    contents = {f.name: evil.ljust(f.size if f.size < 1000 else len(evil), b" ") for f in FILES["cifar-10"].files}
    table = put(tmp_path, "cifar-10-batches-py", contents)
    real = {f.name: f.md5 for f in FILES["cifar-10"].files}
    tables = {"cifar-10": Files(table.folder, tuple(File(f.name, f.size, real[f.name]) for f in table.files))}
    with pytest.raises(DataError, match="data_batch_1 has the md5 sum"):
        load("cifar-10", tmp_path, tables=tables)
    assert not trap.exists()
    pickle.loads(evil)
    assert trap.exists()  # the trap works


def test_old_processed_files_are_not_preferred(tmp_path: Path) -> None:
    tables = small_mnist(tmp_path)
    (tmp_path / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        (tmp_path / "MNIST" / "processed" / name).write_bytes(b"not checked by anybody")
    assert load("mnist", tmp_path, tables=tables).train.labels.tolist() == [7, 0, 9]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def fail(url: str, *_: object, **__: object) -> None:
        asked.append(url)
        raise URLError("Temporary failure in name resolution")

    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", fail)
    return asked


@pytest.mark.parametrize("name", ["mnist", "cifar-10"])
@pytest.mark.parametrize("root", ["", "new", "new/deeper"])
def test_without_a_network_nothing_is_left_behind(
    name: str, root: str, tmp_path: Path, no_network: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    says = rf"could not download {name} \(.*name resolution.*\); put its files into .* or set FASTLTH_DATA"
    with pytest.raises(DataError, match=says) as caught:
        load(name, tmp_path / root)
    assert "\n" not in str(caught.value)
    assert no_network
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_an_interrupted_download_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(url: str, download_root: str, **_: object) -> None:
        (Path(download_root) / "train-images-idx3-ubyte").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("mnist", tmp_path / "root")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tables:
    """A small MNIST that "downloads": every archive unpacks to the file of the same name."""
    tables = small_mnist(tmp_path / "mirror")

    def fetch(url: str, download_root: str, filename: str, **_: object) -> None:
        print("Extracting", filename)
        (Path(download_root) / filename).write_bytes(b"the archive")
        name = filename.removesuffix(".gz")
        (Path(download_root) / name).write_bytes((tmp_path / "mirror" / "MNIST" / "raw" / name).read_bytes())

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetch)
    return tables


def test_a_set_that_is_not_there_is_downloaded(
    tmp_path: Path, mirror: Tables, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "new" / "root"
    assert state("mnist", root, mirror) == "missing"
    assert load("mnist", root, tables=mirror).train.labels.tolist() == [7, 0, 9]
    assert state("mnist", root, mirror) == "ready"
    files = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    assert files == {f"MNIST/raw/{f.name}" for f in mirror["mnist"].files}
    assert [p.name for p in root.iterdir()] == ["MNIST"]
    assert [p.name for p in (root / "MNIST").iterdir()] == ["raw"]
    assert capsys.readouterr().out == ""


def test_a_download_that_is_not_the_set_leaves_nothing_behind(tmp_path: Path, mirror: Tables) -> None:
    flip(tmp_path / "mirror" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte")
    with pytest.raises(DataError, match=r"could not download mnist .*t10k-labels-idx1-ubyte has the md5 sum"):
        load("mnist", tmp_path / "root", tables=mirror)
    assert not (tmp_path / "root").exists()


def test_a_faster_process_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: Tables = {}

    def other_process(url: str, **_: object) -> None:
        if not tables:
            tables.update(small_mnist(tmp_path / "root"))
        raise URLError("gone")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", other_process)
    later = small_mnist(tmp_path / "elsewhere")
    assert load("mnist", tmp_path / "root", tables=later).test.labels.tolist() == [1, 2]


def test_download_can_be_forbidden(tmp_path: Path, no_network: list[str]) -> None:
    with pytest.raises(DataError, match=r"mnist is not in .*raw; put its files into .* or set FASTLTH_DATA"):
        load("mnist", tmp_path / "root", download=False)
    assert no_network == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("root", ["file", "file/below"])
def test_a_root_that_cannot_be_a_folder_is_an_error(root: str, tmp_path: Path, no_network: list[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"could not download mnist .*; put its files into"):
        load("mnist", tmp_path / root)
    assert (tmp_path / "file").read_text() == "in the way"
    assert no_network == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="for root every folder is writable")
def test_an_unwritable_root_is_an_error(tmp_path: Path, no_network: list[str]) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(DataError, match=r"could not download mnist .*Permission denied"):
        load("mnist", tmp_path)
    assert no_network == []


def test_complete_data_is_only_read(tmp_path: Path, no_network: list[str]) -> None:
    tables = small_mnist(tmp_path)
    paths = [tmp_path, *tmp_path.rglob("*")]
    before = snapshot(tmp_path)
    for path in paths:
        path.chmod(0o555)
    try:
        load("mnist", tmp_path, tables=tables)
    finally:
        for path in paths:
            path.chmod(0o755)
    assert snapshot(tmp_path) == before
    assert no_network == []


def test_an_unknown_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown dataset 'mnits'.*did you mean 'mnist'"):
        load("mnits", tmp_path)


def test_the_data_root_is_the_one_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLTH_DATA", str(tmp_path / "env"))
    assert data_root(tmp_path / "explicit") == tmp_path / "explicit"
    assert data_root(None) == tmp_path / "env"
    monkeypatch.setenv("FASTLTH_DATA", "")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    assert data_root(None) == tmp_path / "fastlth" / "data"


REAL = Path(os.environ.get("FASTLTH_DATA") or "nowhere")


@pytest.mark.parametrize("name", ["mnist", "cifar-10"])
def test_the_real_set_is_what_the_catalogue_says(name: str) -> None:
    if state(name, REAL) == "missing":
        pytest.skip(f"{name} is not in FASTLTH_DATA")
    source, facts = load(name, REAL, download=False), DATASETS[name]
    channels, height, width = facts.shape
    assert source.train.pixels.shape == (facts.train, height, width, channels)
    assert source.test.pixels.shape == (facts.test, height, width, channels)
    assert sorted(set(source.train.labels.tolist())) == list(range(facts.classes))
    assert source.train.labels[:5].tolist() == {"mnist": [5, 0, 4, 1, 9], "cifar-10": [6, 9, 9, 4, 1]}[name]
    for channel, (mean, std) in enumerate(zip(facts.mean, facts.std, strict=True)):
        levels = np.arange(256) / 255
        share = np.bincount(source.train.pixels[..., channel].reshape(-1), minlength=256) / facts.train / height / width
        assert share @ levels == pytest.approx(mean, abs=1e-4)
        assert (share @ (levels - mean) ** 2) ** 0.5 == pytest.approx(std, abs=1e-4)
