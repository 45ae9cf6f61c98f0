"""Which images are held out, and the order in which the others are seen.

Both are sorts by random keys: image i's key is two words of the Philox stream, so a split and an order
are functions of (seed, epoch) alone. Nothing has to be saved to go on in the middle of an epoch.
"""

from __future__ import annotations

import numpy as np
from fastlth_kernels import philox
from numpy.typing import NDArray

from fastlth.errors import RecipeError

CACHE_BYTES = 64 * 2**20


def _ranking(images: int, key: philox.Key, c2: int) -> NDArray[np.int64]:
    """Image numbers by ascending key; equal keys (once in 10^10 epochs of 60,000) by number."""
    words = philox.words(0, 2 * images, key, c2=c2).astype(np.uint64)
    return np.argsort(words[0::2] << np.uint64(32) | words[1::2], kind="stable").astype(np.int64)


def split(images: int, validation: int, key: philox.Key) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training indices [images - validation], validation indices [validation]), each ascending.

    Held out are the images with the smallest keys. Raises RecipeError unless 0 <= validation < images.
    """
    if not 0 <= validation < images:
        raise RecipeError(f"data.validation must be in 0 to {images - 1} for {images} images, got {validation}")
    ranking = _ranking(images, key, 0)
    return np.sort(ranking[validation:]), np.sort(ranking[:validation])


def epoch_order(images: int, epoch: int, key: philox.Key) -> NDArray[np.int64]:
    """The permutation of range(images) in which epoch ``epoch`` sees its images: shape [images]."""
    return _ranking(images, key, epoch)


class Order:
    """The images of every iteration, counted from iteration 0 = first batch of epoch 0.

    Raises RecipeError where a batch is larger than the set and would be dropped.
    """

    def __init__(self, images: int, batch_size: int, drop_last: bool, key: philox.Key) -> None:
        full, rest = divmod(images, batch_size)
        self.images = images
        self.batch_size = batch_size
        self.iterations_per_epoch = full + (1 if rest and not drop_last else 0)
        if self.iterations_per_epoch == 0:
            raise RecipeError(f"train.batch_size must be at most the {images} training images, got {batch_size}")
        self.key = key
        # Every round sees the same epochs again, and drawing one costs milliseconds. Keeping the first epochs
        # that fit is the rule that helps a cyclic reader: one that drops the oldest would never find anything.
        self._kept: dict[int, NDArray[np.int32]] = {}
        self._latest: tuple[int, NDArray[np.int32]] | None = None

    def epoch(self, epoch: int) -> NDArray[np.int32]:
        """``epoch_order``, kept for the next time as far as memory allows: read-only, shape [images]."""
        if epoch in self._kept:
            return self._kept[epoch]
        if self._latest is None or self._latest[0] != epoch:
            order = epoch_order(self.images, epoch, self.key).astype(np.int32)
            order.setflags(write=False)
            self._latest = (epoch, order)
            if (len(self._kept) + 1) * order.nbytes <= CACHE_BYTES:
                self._kept[epoch] = order
        return self._latest[1]

    def place(self, iteration: int) -> tuple[int, int, int]:
        """(epoch, first, last): the iteration's images are ``self.epoch(epoch)[first:last]``."""
        epoch, batch = divmod(iteration, self.iterations_per_epoch)
        first = batch * self.batch_size
        return epoch, first, min(first + self.batch_size, self.images)

    def batch(self, iteration: int) -> tuple[int, int, NDArray[np.int64]]:
        """(epoch, position, indices [B]); position is the batch's first place in the epoch's order."""
        epoch, first, last = self.place(iteration)
        return epoch, first, self.epoch(epoch)[first:last].astype(np.int64)
