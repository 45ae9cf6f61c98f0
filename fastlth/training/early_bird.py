"""Early-bird tickets: a round may end once the mask it is heading for stands still (You et al. 2020).

At the end of every epoch the mask is drawn that pruning would give now, and compared with those of the five epochs
before. When the largest distance is below the threshold (the paper: 0.1), more training would change little in what
is pruned. The distance is the share of the weights, among those still kept in the round, on which two masks differ:
in the dense round the normalised Hamming distance of the paper, and as strict in a round that keeps few weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlth.masks import Masks
from fastlth.recipe import WINDOW

_KEY = "early_bird/masks"


@dataclass(frozen=True)
class MaskDrawn:
    """The end of an epoch. ``distance`` is the largest of those to the last five epochs' masks, or to as many as
    there are; None in the round's first epoch. With ``found`` the round ends here."""

    iteration: int
    epoch: int
    distance: float | None
    found: bool


class EarlyBird:
    """Watches one round. ``draw`` gives the masks, nested in ``masks``, that pruning would make of an iteration's
    weights.

    ``every``: iterations per epoch. The round is not ended before iteration ``not_before``, its rewind point.
    """

    def __init__(
        self, threshold: float, every: int, masks: Masks, draw: Callable[[int, Mapping[str, Tensor]], Masks],
        *, not_before: int = 0,
    ) -> None:  # fmt: skip
        self.every = every
        self._threshold, self._not_before = threshold, not_before
        self._masks, self._draw = masks, draw
        self._kept = sum(int(m.sum()) for m in masks.values())
        self._seen = np.zeros((0, -(-self._kept // 8)), np.uint8)
        """[epochs <= 5, bytes]: for every weight kept in the round whether it would stay, as bits, oldest first"""

    def look(self, iteration: int, weights: Mapping[str, Tensor]) -> MaskDrawn:
        """The mask of the epoch that ends here, against those before it. Raises DivergedError for NaN weights."""
        new = self._draw(iteration, weights)
        stays = torch.cat([new[name][mask] for name, mask in self._masks.items()])
        bits = np.packbits(stays.cpu().numpy())
        differ = np.bitwise_count(self._seen ^ bits).sum(1, dtype=np.int64)
        distance = int(differ.max()) / max(self._kept, 1) if len(differ) else None
        stands = distance is not None and len(differ) == WINDOW and distance < self._threshold
        self._seen = np.concatenate([self._seen, bits[None]])[-WINDOW:]
        found = stands and iteration >= self._not_before
        return MaskDrawn(iteration, iteration // self.every, distance, found)

    def state(self) -> dict[str, NDArray[Any]]:
        """What a resume inside the round needs."""
        return {_KEY: self._seen}

    def load_state(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """The inverse of ``state``; other arrays are left alone."""
        self._seen = np.array(arrays[_KEY])
