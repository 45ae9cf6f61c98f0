"""Masks: one bool tensor per prunable weight, of the weight's shape; True = kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Masks = dict[str, Tensor]


def full(weights: Mapping[str, Tensor]) -> Masks:
    """Masks that keep everything."""
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}


def alive(pruned_at: Mapping[str, Tensor], round: int) -> Masks:
    """The masks of a round, from the round that each weight was removed in: integers, 0 = never."""
    return {name: (at == 0) | (at > round) for name, at in pruned_at.items()}


def kept(masks: Mapping[str, Tensor]) -> int:
    """How many weights are kept, over all masks."""
    return sum(int(m.sum()) for m in masks.values())


def nested(inner: Mapping[str, Tensor], outer: Mapping[str, Tensor]) -> bool:
    """Whether ``inner`` keeps nothing that ``outer`` removed."""
    return inner.keys() == outer.keys() and not any(bool((inner[n] & ~outer[n]).any()) for n in inner)


def copy_(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Write ``source`` into the tensors of ``target``: tensors keep their identity through all rounds, so
    nothing that was compiled or captured around them has to be made again."""
    for name, mask in target.items():
        mask.copy_(source[name])
