"""The streamed loader: the training images stay in host memory, and each batch is copied to the device.

For a device without room for the set; ``fastlth[ffcv]`` does the same from a file, with work ahead.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from fastlth.data.loader import Batch, on_device
from fastlth.data.order import Order
from fastlth.data.resident import ResidentLoader
from fastlth.data.sources import Images


class StreamedLoader:
    """The batches of ``ResidentLoader``, bit for bit; it takes the same arguments."""

    def __init__(self, images: Images, indices: NDArray[np.int64], order: Order, device: torch.device) -> None:
        self._host = ResidentLoader(images, indices, order, torch.device("cpu"))
        self.iterations_per_epoch = self._host.iterations_per_epoch
        self._device = device

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        for batch in self._host.batches(first, last):
            pixels = on_device(batch.images.permute(0, 2, 3, 1), self._device).permute(0, 3, 1, 2)
            yield Batch(pixels, on_device(batch.labels, self._device), batch.epoch, batch.position)

    def close(self) -> None:
        """Nothing runs in the background."""
