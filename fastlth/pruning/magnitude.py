"""Magnitude pruning on a GPU, by ``prune_lowest``: digit by digit, in passes over the weights as they lie in memory.

The very weights that ``select.remove_lowest`` removes for the scores |w|, ties by the same keys, without a copy of the
kept weights, their places and their scores beside them. (``masked_step`` can count the first digits while it updates;
the last step of a round would need a graph of its own for it, to save one of three passes in some minutes.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from fastlth_kernels.bitmask import pack, unpack
from fastlth_kernels.kth_magnitude import prune_lowest
from fastlth_kernels.launch import on_gpu
from fastlth_kernels.philox import Key
from torch import Tensor

from fastlth.errors import EnvironmentFailure
from fastlth.masks import Masks
from fastlth.recipe import PruneSection


def usable(prune: PruneSection, weights: Mapping[str, Tensor]) -> bool:
    """Whether the criterion is magnitude, and the kernel can rank these weights."""
    ranked = all(on_gpu(w) and w.dtype == torch.float32 for w in weights.values())
    return prune.criterion == "large_final" and ranked


def remove_smallest(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], names: Sequence[str], count: int,
    *, numbers: Mapping[str, int], round: int, key: Key,
) -> Masks:  # fmt: skip
    """New masks of the tensors ``names``, with the ``count`` kept weights of lowest magnitude over all of them gone.

    Arguments as in ``select.remove_lowest``; no kept weight is NaN. Raises EnvironmentFailure where the device removed
    others than these: a wrong mask is worse than none, and one look at all weights per round costs nothing.
    """
    if count == 0:
        return {n: masks[n].clone() for n in names}
    lying = [_rows(weights[n]) for n in names]
    bits = [pack(_rows(masks[n])) for n in names]
    prune_lowest(lying, bits, count, [numbers[n] for n in names], round, list(key))
    found = {n: _places(unpack(b, w.shape[-1])) for n, b, w in zip(names, bits, lying, strict=True)}
    _verify(weights, masks, found, count)
    return found


def _verify(weights: Mapping[str, Tensor], before: Mapping[str, Tensor], after: Masks, count: int) -> None:
    """Exactly ``count`` weights went, none came back, and none that went is larger than one that stayed."""
    gone = [before[n] & ~after[n] for n in after]
    lowest = min(float(weights[n].abs().masked_fill(~m, torch.inf).min()) for n, m in after.items())
    highest = max(float(weights[n].abs().masked_fill(~m, 0).max()) for n, m in zip(after, gone, strict=True))
    came = any(bool((m & ~before[n]).any()) for n, m in after.items())
    if sum(int(m.sum()) for m in gone) != count or came or highest > lowest:
        raise EnvironmentFailure("the GPU's kernel for pruning removed other weights than the smallest; please report "
                                 "it with the versions that 'fastlth doctor' shows, and prune on the CPU with "
                                 "--engine dense --device cpu")  # fmt: skip


def _rows(tensor: Tensor) -> Tensor:
    """As kernels read it: weights of convolutions as OHWI."""
    return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).contiguous()


def _places(mask: Tensor) -> Tensor:
    return (mask.permute(0, 3, 1, 2) if mask.dim() == 4 else mask).contiguous()
