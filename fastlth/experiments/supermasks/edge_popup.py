"""Edge-popup (Ramanujan et al. 2020, "What's Hidden in a Randomly Weighted Neural Network?"): keep the highest scores.

m = 1 for the k highest scores of a layer, else 0        forward
dL/ds = dL/dm                                            backward: straight through
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from fastlth_kernels.philox import Key
from torch import Tensor

from fastlth.experiments.supermasks.learned import straight_through
from fastlth.models.init import uniform
from fastlth.recipe import exact


def first_scores(weights: Mapping[str, Tensor], key: Key) -> list[Tensor]:
    """Uniform in +-1/sqrt(fan_in), the paper's Kaiming uniform; one float32 tensor per weight."""
    drawn = []
    for number, weight in enumerate(weights.values()):
        bound = 1.0 / math.sqrt(weight[0].numel())
        values = torch.from_numpy(bound * uniform(number, weight.numel(), key)).to(torch.float32)
        drawn.append(values.view(weight.shape))
    return drawn


def kept(size: int, keep: float) -> int:
    """How many of ``size`` weights stay: all but floor((1 - keep) * size), exactly, and at least one."""
    return max(1, size - int((1 - exact(keep)) * size))


def highest(scores: Sequence[Tensor], keep: float) -> list[Tensor]:
    """Masks of 0.0 and 1.0, one per tensor of scores, with exactly ``kept(size, keep)`` ones."""
    masks = []
    for s in scores:
        top = s.detach().reshape(-1).topk(kept(s.numel(), keep), sorted=False).indices
        mask = torch.zeros(s.numel(), device=s.device).index_fill_(0, top, 1.0)
        masks.append(straight_through(s, mask.view(s.shape)))
    return masks
