"""Random keys of weights: pure functions of (seed, round, tensor, index), the same bits on every device."""

from __future__ import annotations

import torch
from fastlth_kernels.philox import Key, philox
from torch import Tensor

# The last word of the counter keeps what is drawn for different ends apart; never renumber.
TIES, MASK_1, FREEZE_REINIT, ZERO_RESHUFFLE, REINIT = range(5)


def keys(index: Tensor, tensor: Tensor, round: int, key: Key, purpose: int = TIES) -> Tensor:
    """63 random bits per weight, int64 of the shape of ``index``: its place in the weight tensor, flattened.

    ``tensor`` (same shape) holds the tensor's place in the model.
    """
    w0, w1, _, _ = philox(index, tensor, torch.full_like(index, round), torch.full_like(index, purpose), key)
    drawn: Tensor = (w0 << 31) | (w1 >> 1)
    return drawn


def net_key(round: int, key: Key) -> Key:
    """The key with which a whole net's values are drawn afresh for a round."""
    w0, w1, _, _ = philox(round, 0, 0, REINIT, key)
    return w0, w1


def permutation(index: Tensor, number: int, round: int, key: Key, purpose: int) -> Tensor:
    """Where each of the weights ``index`` [n] of tensor ``number`` gets its value from: int64 [n], a permutation
    of range(n). It orders the weights by their keys."""
    return keys(index, torch.full_like(index, number), round, key, purpose).argsort(stable=True)
