"""Learned supermasks (Zhou et al. 2019, section 5.2): a mask drawn anew at every step, from trained probabilities.

m ~ Bernoulli(sigmoid(s))          forward; or m = [sigmoid(s) >= 1/2] when rounding
dL/ds = dL/dm * sigmoid'(s)        backward: straight through the draw, as if m were sigmoid(s)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fastlth_kernels.philox import Key, philox
from torch import Tensor

# The last word of the counters keeps these draws apart from those of pruning (pruning/draws.py).
TRAINING, EVALUATION = 16, 17


class _StraightThrough(torch.autograd.Function):
    """Forward the mask, backward to the relaxed values as they are."""

    @staticmethod
    def forward(ctx: Any, relaxed: Tensor, mask: Tensor) -> Tensor:
        return mask.to(relaxed.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(relaxed: Tensor, mask: Tensor) -> Tensor:
    """``mask`` as numbers; its gradient goes to ``relaxed`` (same shape) unchanged."""
    passed: Tensor = _StraightThrough.apply(relaxed, mask)
    return passed


def bernoulli(scores: Sequence[Tensor], number: Tensor, purpose: int, key: Key) -> list[Tensor]:
    """Masks of 0.0 and 1.0, one per tensor of scores, each entry kept with probability sigmoid(score).

    ``number`` (int64, 0-d, on the device) is the step, or which sample of an evaluation. Word i of the stream
    decides entry i of all scores laid end to end: kept if its upper 24 bits are below 2^24 * probability.
    """
    uniform = torch.split(_uniform(sum(s.numel() for s in scores), number, purpose, key), [s.numel() for s in scores])
    chances = [s.sigmoid() for s in scores]
    return [straight_through(p, u.view(p.shape) < p) for p, u in zip(chances, uniform, strict=True)]


def rounded(scores: Sequence[Tensor]) -> list[Tensor]:
    """As ``bernoulli``, without the draw: kept where the probability is at least one half. So a net whose scores are
    still 0 keeps everything; one that keeps nothing would pass no gradient to any score."""
    return [straight_through(s.sigmoid(), s >= 0) for s in scores]


def _uniform(count: int, number: Tensor, purpose: int, key: Key) -> Tensor:
    """``count`` numbers in [0, 1), float32."""
    block = torch.arange((count + 3) // 4, device=number.device)
    words = torch.stack(philox(block, torch.zeros_like(block), number, purpose, key), 1).view(-1)[:count]
    return (words >> 8).to(torch.float32) * 2.0**-24
