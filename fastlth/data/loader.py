"""What a loader is: batches of any stretch of iterations, the same bits whichever loader gives them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Images as a loader gives them, not yet augmented, and their labels."""

    images: Tensor
    """uint8 [B, C, H, W], an NHWC buffer seen as NCHW (channels-last strides)"""
    labels: Tensor
    """int64 [B]"""
    epoch: int
    position: int
    """place of the first image in the epoch's order: with the epoch, the counter of its augmentation"""


class Loader(Protocol):
    """Gives the training images in an order of (seed, epoch) alone."""

    iterations_per_epoch: int

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of iterations [first, last); iteration 0 is the first batch of epoch 0."""
        ...

    def close(self) -> None:
        """Ends what runs in the background. The loader can be used again afterwards."""
        ...


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy of ``host`` (on the CPU) on ``device``. On CUDA nobody waits for it."""
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device, copy=True)
