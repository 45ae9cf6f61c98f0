"""The loader of photo-crop: threads decode and cut the photographs of the next batches while one is trained on."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from fastlth_kernels.philox import Key, philox
from numpy.typing import NDArray

from fastlth.data.loader import Batch, on_device
from fastlth.data.order import Order
from fastlth.data.photos import Decode, crop, workers

AHEAD = 3  # batches that are decoded while earlier ones are trained on


_Making = tuple[NDArray[np.uint8], list[Future[None]]]
"""a batch's images and the jobs that fill them"""


class PhotoLoader:
    """Random crops of ``indices`` of some photographs in the order given; ``order`` counts within ``indices``.

    ``decode`` is called from several threads. labels: int64, of all photographs. Batches hold uint8 [B, 3, size, size].
    """

    def __init__(self, decode: Decode, labels: NDArray[np.int64], indices: NDArray[np.int64], order: Order, *,
                 size: int, key: Key, device: torch.device) -> None:  # fmt: skip
        self.iterations_per_epoch = order.iterations_per_epoch
        self._decode, self._labels, self._indices, self._order = decode, labels, indices, order
        self._size, self._key, self._device = size, key, device
        self._begun: dict[int, _Making] = {}  # by iteration
        self._pool: ThreadPoolExecutor | None = None
        self._end: weakref.finalize[Any, Any] | None = None

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """As ``Loader.batches``. Raises DataError where a photograph cannot be read."""
        for iteration in range(first, last):
            wanted = range(iteration, iteration + 1 + AHEAD)
            for old in [i for i in self._begun if i not in wanted]:
                self._drop(old)
            for i in wanted:
                if i not in self._begun:
                    self._begun[i] = self._begin(i)
            out, parts = self._begun.pop(iteration)
            for part in parts:
                part.result()
            epoch, position, chosen = self._order.batch(iteration)
            labels = torch.from_numpy(self._labels[self._indices[chosen]])
            yield Batch(on_device(torch.from_numpy(out), self._device).permute(0, 3, 1, 2),
                        on_device(labels, self._device), epoch, position)  # fmt: skip

    def close(self) -> None:
        """Ends the threads that decode. The loader can be used again afterwards."""
        if self._end is not None:
            self._end()
        self._begun, self._pool, self._end = {}, None, None

    def _begin(self, iteration: int) -> _Making:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(workers(), thread_name_prefix="fastlth-decode")
            self._end = weakref.finalize(self, self._pool.shutdown, cancel_futures=True)  # also at exit
        epoch, position, chosen = self._order.batch(iteration)
        out = np.empty((len(chosen), self._size, self._size, 3), dtype=np.uint8)
        job = (self._decode, self._indices[chosen], out, epoch, position, self._key)
        parts = np.array_split(np.arange(len(chosen)), min(workers(), len(chosen)))
        return out, [self._pool.submit(_fill, *job, part) for part in parts]

    def _drop(self, iteration: int) -> None:
        for part in self._begun.pop(iteration)[1]:
            part.cancel()


def _fill(
    decode: Decode, photos: NDArray[np.int64], out: NDArray[np.uint8], epoch: int, position: int, key: Key,
    rows: NDArray[np.int64],
) -> None:  # fmt: skip
    for row in rows.tolist():
        out[row] = crop(decode(int(photos[row])), philox(position + row, 0, epoch, 0, key), len(out[row]))
