"""Both loaders against plain indexing, bit for bit, from any iteration to any other."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlth.data import ffcv
from fastlth.data.loader import Batch, Loader
from fastlth.data.order import Order, split
from fastlth.data.resident import ResidentLoader
from fastlth.data.sources import Images
from fastlth.errors import EnvironmentFailure, RecipeError

CPU = torch.device("cpu")
REASON = ffcv.available()
needs_ffcv = pytest.mark.skipif(REASON is not None, reason=str(REASON))
KINDS = ["resident", pytest.param("ffcv", marks=needs_ffcv)]


def some_images(channels: int, count: int = 60) -> Images:
    generator = np.random.default_rng(channels)
    size = {1: (28, 28, 1), 3: (5, 3, 3)}[channels]  # 45 bytes: not a whole number of 8-byte words
    return Images(generator.integers(0, 256, (count, *size), dtype=np.uint8), generator.integers(0, 10, count))


def make(kind: str, images: Images, order: Order, indices: np.ndarray, cache: Path) -> Loader:
    if kind == "resident":
        return ResidentLoader(images, indices, order, CPU)
    return ffcv.FfcvLoader(images, indices, order, CPU, cache)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("beton")


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert set(threading.enumerate()) <= before


def assert_same(batch: Batch, iteration: int, images: Images, indices: np.ndarray, order: Order) -> None:
    epoch, position, chosen = order.batch(iteration)
    assert (batch.epoch, batch.position) == (epoch, position)
    assert batch.images.dtype == torch.uint8
    assert batch.images.permute(0, 2, 3, 1).is_contiguous()
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), images.pixels[indices[chosen]])
    assert batch.labels.dtype == torch.int64
    assert np.array_equal(batch.labels.numpy(), images.labels[indices[chosen]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_are_plain_indexing(kind: str, channels: int, drop_last: bool, cache: Path) -> None:
    images = some_images(channels)
    indices, _ = split(60, 10, (0, 2))
    order = Order(50, 8, drop_last, (0, 3))
    loader = make(kind, images, order, indices, cache)
    assert loader.iterations_per_epoch == (6 if drop_last else 7)
    # Three epochs, the middle of one, back again, one batch, the last partial batch, going on, nothing.
    for first, last in ((0, 21), (3, 9), (1, 4), (4, 5), (6, 7), (7, 8), (20, 22), (5, 5)):
        batches = list(loader.batches(first, last))
        assert len(batches) == last - first
        for iteration, batch in zip(range(first, last), batches, strict=True):
            assert_same(batch, iteration, images, indices, order)
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_stays_valid_when_later_ones_are_drawn(kind: str, cache: Path) -> None:
    images, order, indices = some_images(1), Order(60, 4, True, (0, 3)), np.arange(60)
    loader = make(kind, images, order, indices, cache)
    first = next(iter(loader.batches(0, 1)))
    kept = first.images.clone(), first.labels.clone()
    for batch in loader.batches(1, 30):  # FFCV has five buffers
        batch.images.fill_(7)  # nor does writing into a batch reach the set
    assert torch.equal(first.images, kept[0])
    assert torch.equal(first.labels, kept[1])
    assert_same(next(iter(loader.batches(1, 2))), 1, images, indices, order)
    loader.close()


@needs_ffcv
def test_ffcv_goes_on_with_an_open_epoch(cache: Path) -> None:
    images, order, indices = some_images(1), Order(60, 4, True, (0, 3)), np.arange(60)
    loader = ffcv.FfcvLoader(images, indices, order, CPU, cache)
    readers = []
    for first, last in ((0, 3), (3, 4), (4, 15), (15, 16)):
        for iteration, batch in zip(range(first, last), loader.batches(first, last), strict=True):
            assert_same(batch, iteration, images, indices, order)
        readers.append(loader._running)
    assert readers[0] is readers[1] is readers[2]  # chunks of one epoch
    assert readers[3] is not readers[2]
    loader.close()


@needs_ffcv
def test_ffcv_takes_turns_between_two_readers(cache: Path) -> None:
    images, order, indices = some_images(1), Order(60, 4, True, (0, 3)), np.arange(60)
    loader = ffcv.FfcvLoader(images, indices, order, CPU, cache)
    for a, b in zip(loader.batches(0, 5), loader.batches(7, 12), strict=True):
        assert_same(a, order.iterations_per_epoch * a.epoch + a.position // 4, images, indices, order)
        assert_same(b, order.iterations_per_epoch * b.epoch + b.position // 4, images, indices, order)
    loader.close()


@needs_ffcv
@pytest.mark.parametrize("drawn", [1, 10, 14, 15])
def test_an_abandoned_ffcv_loader_leaves_no_thread(drawn: int, cache: Path) -> None:
    loader = ffcv.FfcvLoader(some_images(1), np.arange(60), Order(60, 4, True, (0, 3)), CPU, cache)
    batches = loader.batches(0, 100)
    for _ in range(drawn):
        next(batches)
    assert loader._running is not None
    del loader, batches  # the fixture looks for threads


@needs_ffcv
def test_a_process_ends_with_an_ffcv_epoch_open(cache: Path) -> None:
    program = """
        import sys, numpy as np, torch
        from pathlib import Path
        from fastlth.data.ffcv import FfcvLoader
        from fastlth.data.order import Order
        from fastlth.data.sources import Images
        images = Images(np.zeros((60, 28, 28, 1), np.uint8), np.zeros(60, np.int64))
        order = Order(60, 4, True, (0, 3))
        loader = FfcvLoader(images, np.arange(60), order, torch.device("cpu"), Path(sys.argv[1]))
        batches = loader.batches(0, 100)
        next(batches)
        print("drawn")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(cache)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "drawn\n", "")


@needs_ffcv
def test_a_reader_that_died_is_an_error_not_a_hang(cache: Path) -> None:
    loader = ffcv.FfcvLoader(some_images(1), np.arange(60), Order(60, 4, True, (0, 3)), CPU, cache)
    next(iter(loader.batches(0, 1)))
    ffcv._stop(loader._running)
    with pytest.raises(EnvironmentFailure, match="FFCV stopped reading"):
        list(loader.batches(1, 15))
    assert len(list(loader.batches(1, 15))) == 14
    loader.close()


@needs_ffcv
def test_ffcv_leaves_threads_and_random_numbers_alone(cache: Path) -> None:
    import numba

    threads = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(2)
    numba.set_num_threads(1)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    loader = ffcv.FfcvLoader(some_images(1), np.arange(60), Order(60, 4, True, (0, 3)), CPU, cache)
    list(loader.batches(0, 20))
    loader.close()
    after = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(threads[0])
    numba.set_num_threads(threads[1])
    assert after == (2, 1)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@needs_ffcv
def test_ffcv_leaves_the_types_of_numba_alone(cache: Path) -> None:
    import numba  # FFCV 1.0.2 makes this very object read-only, which loses what was compiled for uint8 arrays

    before = hash(numba.uint8[::1])
    loader = ffcv.FfcvLoader(some_images(1), np.arange(60), Order(60, 4, True, (0, 3)), CPU, cache)
    list(loader.batches(0, 2))
    loader.close()
    assert numba.uint8[::1].mutable and hash(numba.uint8[::1]) == before


@needs_ffcv
def test_the_beton_is_written_once_per_content(tmp_path: Path) -> None:
    images = some_images(1)
    path = ffcv.beton(images, tmp_path / "deep" / "cache")
    written = path.stat()
    assert ffcv.beton(images, path.parent) == path
    assert path.stat().st_mtime_ns == written.st_mtime_ns
    assert path.stat().st_ino == written.st_ino
    other = Images(images.pixels, (images.labels + 1) % 10)
    assert ffcv.beton(other, path.parent) != path
    left = {p.name for p in path.parent.iterdir() if p.suffix != ".lock"}
    assert left == {path.name, ffcv.beton(other, path.parent).name}


@needs_ffcv
def test_a_beton_that_is_there_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ffcv.beton(some_images(1), tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ffcv, "FileLock", refuse)
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert ffcv.beton(some_images(1), tmp_path) == path
    with pytest.raises(EnvironmentFailure, match="Permission denied"):
        ffcv.beton(some_images(3), tmp_path)


@needs_ffcv
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_a_damaged_beton_is_written_again(damage: str, tmp_path: Path) -> None:
    images = some_images(1)
    path = ffcv.beton(images, tmp_path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-100], "empty": b"", "garbage": bytes(len(whole))}[damage])
    assert ffcv.beton(images, tmp_path) == path
    assert path.read_bytes() == whole


@needs_ffcv
def test_a_full_disk_leaves_no_beton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ffcv.memory_allocator.MemoryAllocator.flush_page", full)
    with pytest.raises(EnvironmentFailure, match=r"cannot write .*\.beton \(No space left on device\); free space"):
        ffcv.beton(some_images(1), tmp_path)
    assert [p for p in tmp_path.iterdir() if p.suffix != ".lock"] == []


@needs_ffcv
def test_a_cache_that_cannot_be_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFailure, match="cannot write"):
        ffcv.beton(some_images(1), tmp_path / "file" / "cache")


def test_without_ffcv_the_loader_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs the ffcv package; install fastlth\[ffcv\] or use --loader resident"):
        ffcv.FfcvLoader(some_images(1), np.arange(60), Order(60, 4, True, (0, 3)), CPU, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
