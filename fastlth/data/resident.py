"""The resident loader: the training images live on the device, and a batch is one gather."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlth.data.loader import Batch, on_device
from fastlth.data.order import Order
from fastlth.data.sources import Images


class ResidentLoader:
    """Batches of ``images[indices]`` in the order given; ``order`` counts within ``indices``.

    indices: int64 [order.images]. Keeps N * (H * W * C + 8) bytes on the device.
    """

    def __init__(self, images: Images, indices: NDArray[np.int64], order: Order, device: torch.device) -> None:
        self.iterations_per_epoch = order.iterations_per_epoch
        self._order = order
        self._device = device
        self._shape = images.pixels.shape[1:]
        rows = torch.from_numpy(images.pixels[indices]).view(len(indices), -1).to(device)
        # Gathered as int64 words where a row is a whole number of them: an eighth of the elements keeps a batch
        # below the size at which torch splits the copy among threads, which costs more than the copy
        # (60 x 784 bytes: 15 us; on a busy machine the threads made it 30 to 400).
        self._pixels = rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows
        self._labels = torch.from_numpy(images.labels[indices]).to(device)
        self._epoch = -1
        self._rows: Tensor = torch.empty(0, dtype=torch.int32, device=device)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """As ``Loader.batches``; each batch is a new tensor on the device."""
        for iteration in range(first, last):
            epoch, start, end = self._order.place(iteration)
            if epoch != self._epoch:
                # The whole epoch's order at once: one upload per epoch, and per batch only a slice.
                self._rows, self._epoch = on_device(torch.tensor(self._order.epoch(epoch)), self._device), epoch
            rows = self._rows[start:end]
            pixels = self._pixels.index_select(0, rows).view(torch.uint8).view(-1, *self._shape)
            yield Batch(pixels.permute(0, 3, 1, 2), self._labels.index_select(0, rows), epoch, start)

    def close(self) -> None:
        """Nothing runs in the background."""
