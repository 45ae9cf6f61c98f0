"""The FFCV loader: images stream from one .beton file, so the set need not fit on the device.

FFCV reads the file ahead in a thread; the order is ours, so its batches are the resident loader's bit for bit.
Images are stored as plain arrays (``NDArrayField``): that field takes one channel as well as three, and its
decoder compiles in 0.65 s, where ``RGBImageField`` refuses one channel and takes 5 to 9 s.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import queue
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from fastlth.data.loader import Batch, on_device
from fastlth.data.order import Order
from fastlth.data.sources import Images
from fastlth.errors import EnvironmentFailure, RecipeError


def available() -> str | None:
    """Why FFCV cannot be used here, or None."""
    if importlib.util.find_spec("ffcv") is None:
        return "--loader ffcv needs the ffcv package; install fastlth[ffcv] or use --loader resident"
    try:
        with _threads_kept():
            import ffcv.loader  # noqa: F401
    except (ImportError, OSError) as error:
        return f"the ffcv package does not load ({error}); install fastlth[ffcv] again or use --loader resident"
    return None


class FfcvLoader:
    """Batches of ``images[indices]`` in the order given; ``order`` counts within ``indices``.

    indices: int64 [order.images]. The .beton is written into ``cache`` once per content of ``images``.
    Raises RecipeError without FFCV, EnvironmentFailure where the .beton cannot be written or read.
    """

    def __init__(
        self, images: Images, indices: NDArray[np.int64], order: Order, device: torch.device, cache: Path
    ) -> None:
        reason = available()
        if reason:
            raise RecipeError(reason)
        self.iterations_per_epoch = order.iterations_per_epoch
        self._order = order
        self._indices = indices
        self._device = device
        self._loader = _open(beton(images, cache), order.batch_size)
        self._running: Any = None  # the open epoch's iterator and the iteration it gives next
        self._next = -1
        self._end: weakref.finalize[Any, Any] | None = None

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """As ``Loader.batches``. Raises EnvironmentFailure where FFCV's reading thread has died."""
        for iteration in range(first, last):
            epoch, start, _ = self._order.place(iteration)
            if iteration != self._next or start == 0:
                self._start(epoch, start)
            self._next = -1  # whatever goes wrong below, the next call starts afresh
            pixels, labels = _next(self._running)
            # FFCV will write into these buffers again: what we hand out are copies.
            images = on_device(pixels, self._device).permute(0, 3, 1, 2)
            batch = Batch(images, on_device(labels[:, 0], self._device), epoch, start)
            self._next = iteration + 1
            yield batch

    def close(self) -> None:
        """Ends FFCV's reading thread. The loader can be used again afterwards."""
        if self._end is not None:
            self._end()
        self._running, self._next = None, -1

    def _start(self, epoch: int, start: int) -> None:
        self.close()
        last = min(self.iterations_per_epoch * self._order.batch_size, self._order.images)
        # FFCV's constructor refuses orders of our own, but the attribute takes anything with sample_order().
        self._loader.traversal_order = _Given(self._indices[self._order.epoch(epoch)[start:last]])
        with _threads_kept():
            self._running = iter(self._loader)
        self._end = weakref.finalize(self, _stop, self._running)  # also at exit


class _Given:
    def __init__(self, indices: NDArray[np.int64]) -> None:
        self.indices = indices.astype(np.uint64)

    def sample_order(self, epoch: int) -> NDArray[np.uint64]:
        return self.indices


def _next(running: Any) -> tuple[Tensor, Tensor]:
    """The next batch of an FFCV iterator: views [B, H, W, C] and [B, 1] of its buffers.

    Not ``next(running)``, which would wait for ever once the reading thread has died.
    """
    while True:
        item, alive = None, running.is_alive()
        with contextlib.suppress(queue.Empty):
            item = running.output_queue.get(timeout=1 if alive else 0)
        if item is not None:
            _, (pixels, labels) = item
            return pixels, labels
        if not alive:
            raise EnvironmentFailure("FFCV stopped reading its .beton file; use --loader resident")


def _stop(running: Any) -> None:
    """Ends an FFCV iterator's thread at once. Its own close() leaves it waiting for a reader that is gone."""
    running.iter_ixes = iter(())
    while running.is_alive():
        with contextlib.suppress(queue.Empty):
            running.output_queue.get(timeout=0.01)
    running.close()


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    """FFCV sets the thread counts of torch and numba, even on import; they are not its to choose."""
    import numba

    threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        numba.set_num_threads(threads[1])


def _open(path: Path, batch_size: int) -> Any:
    import numba

    with _threads_kept():
        import ffcv.loader.loader

        ffcv.loader.loader.OSCacheManager = _memory_manager()
        return ffcv.loader.Loader(
            str(path),
            batch_size=batch_size,
            num_workers=min(4, numba.get_num_threads()),  # numba refuses more than it has
            seed=0,  # unused, but without it FFCV draws from numpy's global generator
            drop_last=False,  # the orders we give leave out what is to be left out
        )


@functools.cache
def _memory_manager() -> type:
    """FFCV's manager of the mapped file, without its write into ``numba.uint8[::1]``.

    That object is the one type of all such arrays in the process: made read-only by FFCV 1.0.2, its hash changes, and
    every function already compiled for uint8 arrays loses its entry in numba's tables (KeyError at the next
    compilation).
    """
    import numba
    from ffcv.memory_managers import OSCacheManager
    from ffcv.pipeline.compiler import Compiler

    file = numba.uint8[::1].copy(readonly=True)
    state = numba.types.Tuple([file, numba.uint64[::1], numba.uint64[::1]])

    class Manager(OSCacheManager):  # type: ignore[misc]
        state_type = state

        def compile_reader(self) -> Any:
            def read(address: Any, mapped: Any) -> Any:
                data, starts, sizes = mapped
                return data[address : address + sizes[np.searchsorted(starts, address)]]

            return Compiler.compile(read, file(numba.uint64, state))

    return Manager


def digest(images: Images) -> str:
    """sha256 (hex) of shape, pixels and labels, or of the images' name: the name of the set's .beton."""
    if images.name:
        return hashlib.sha256(images.name.encode()).hexdigest()
    sha = hashlib.sha256(repr(images.pixels.shape).encode())
    sha.update(np.ascontiguousarray(images.pixels).data)
    sha.update(images.labels.astype("<i8").tobytes())
    return sha.hexdigest()


def beton(images: Images, cache: Path) -> Path:
    """The .beton file of ``images`` in ``cache``, written if it is not there or not whole.

    Raises EnvironmentFailure where it cannot be written.
    """
    return made(cache / f"{digest(images)[:16]}.beton", images.labels, lambda file: _write(file, images))


def made(path: Path, labels: NDArray[np.int64], write: Callable[[Path], None], other: str = "resident") -> Path:
    """``path``, a .beton of images with these labels, made by ``write`` if it is not there or not whole.

    Raises EnvironmentFailure, with the name of the loader that needs no file, where it cannot be written.
    """
    if _whole(path, labels):
        return path  # and nothing is written, not even a lock: the folder may be read-only
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not _whole(path, labels):
                with tempfile.TemporaryDirectory(prefix=".beton-", dir=path.parent) as folder:
                    write(Path(folder) / path.name)
                    os.replace(Path(folder) / path.name, path)
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write {path} ({error.strerror}); free space, choose another folder or use --loader {other}"
        ) from None
    return path


def imported(module: str) -> Any:
    """A module of FFCV's; the thread counts stay what they are."""
    with _threads_kept():
        return importlib.import_module(module)


def _whole(path: Path, labels: NDArray[np.int64]) -> bool:
    """Whether the file has a header, every label and an entry for every image."""
    if not path.is_file():
        return False
    try:
        reader = imported("ffcv.reader").Reader(str(path))
        same = np.array_equal(reader.metadata["f1"], labels)
    except Exception:  # whatever FFCV trips over in a damaged file, the answer is to write it again
        return False
    return same and len(reader.alloc_table) == len(labels)


def _write(path: Path, images: Images) -> None:
    image = imported("ffcv.fields").NDArrayField(np.dtype(np.uint8), images.pixels.shape[1:])
    write(path, image, np.asarray(images.pixels), images.labels)


def write(path: Path, image: Any, images: Iterable[Any], labels: NDArray[np.int64], page_bytes: int = 2**23) -> None:
    """One .beton of images, encoded by the field ``image``, and labels, written by FFCV's parts in this process.

    Its DatasetWriter.from_indexed_dataset would fork workers, and wait for ever if one met a full disk.
    """
    with _threads_kept():
        from ffcv.fields import IntField
        from ffcv.memory_allocator import MemoryAllocator
        from ffcv.writer import DatasetWriter, handle_sample

    fields = {"image": image, "label": IntField()}
    writer = DatasetWriter(str(path), fields, page_size=page_bytes, num_workers=1)
    writer.num_samples = len(labels)
    writer.prepare()
    try:
        metadata = np.zeros(len(labels), writer.metadata_type)
        allocator = MemoryAllocator(str(path), writer.data_region_start, writer.page_size)
        try:
            with allocator:
                for i, sample in enumerate(zip(images, labels, strict=True)):
                    handle_sample(sample, i, metadata.dtype.names, metadata, allocator, fields)
        finally:
            allocator.fp.close()  # FFCV leaves it open where a page cannot be written
        writer.metadata_sm.buf[: metadata.nbytes] = metadata.tobytes()
        writer.finalize([allocator.allocations])
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
