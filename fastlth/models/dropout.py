"""Dropout (Srivastava et al. 2014) that follows from a seed: what is dropped is a function of (seed, epoch, place).

Row j of a batch draws counters (position + j, block of four units, epoch, layer), so that a resumed training drops what
it would have dropped, compiled or not, whatever the batch size, and no state has to be saved.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from fastlth_kernels.philox import Key, philox
from torch import Tensor, nn

from fastlth.errors import RecipeError


class Dropout(nn.Module):
    """Sets a share of a batch's features [B, ...] to zero in training and scales the others up; else the identity.

    A training step that sets ``keyed`` writes its batch's (epoch, position) into ``place`` before every forward pass;
    in anybody else's loop this is torch's own dropout.
    """

    place: Tensor
    """int64 [2]: epoch, and the place of the batch's first image in it"""

    def __init__(self, rate: float, layer: int, key: Key) -> None:
        super().__init__()
        self.rate, self.layer, self.key = rate, layer, key
        self.keyed = False
        self.register_buffer("place", torch.zeros(2, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, ...] with a share of them zero and the others divided by what is left, in training."""
        if not self.keyed or not self.training:
            return F.dropout(x, self.rate, self.training)
        words = self._words(x.shape[0], math.prod(x.shape[1:])).view(x.shape)
        return torch.where(words >= round(self.rate * 2**32), x / (1.0 - self.rate), 0.0)

    def _words(self, rows: int, units: int) -> Tensor:
        """A random word per row and unit: int64 [rows, units] in [0, 2^32)."""
        device = self.place.device
        row = torch.arange(rows, device=device)[:, None] + self.place[1]
        block = torch.arange((units + 3) // 4, device=device)[None]
        words = philox(row, block, self.place[0], self.layer, self.key)
        return torch.stack(words, dim=2).flatten(1)[:, :units]

    def extra_repr(self) -> str:
        return f"{self.rate:g}"


class DroppedLinear(nn.Linear):
    """A linear layer on inputs of which training drops a share. They are dropped ahead of ``forward``, in whose place
    others may put their own (training/kept.py)."""

    dropout: Dropout


def add_dropout_(model: nn.Module, rate: float, key: Key) -> None:
    """Dropout on the inputs of all linear layers but the first, which are the outputs of hidden ones; a net with one
    alone (VGG, ResNet) has it on the pooled features before it. In place: weights, their names and their order stay,
    and a layer that stands in several places drops in all of them. Raises RecipeError for a net without linear layers.
    """
    linear = [m for m in model.modules() if type(m) is nn.Linear]  # others do not call theirs (attention's projection)
    if not linear:
        raise RecipeError(f"model.dropout must be 0 for a net without linear layers, got {rate:g}")
    for number, layer in enumerate(linear[1:] or linear):
        layer.__class__ = DroppedLinear
        layer.dropout = Dropout(rate, number, key)
        layer.register_forward_pre_hook(_drop)


def _drop(layer: DroppedLinear, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (layer.dropout(inputs[0]),)
