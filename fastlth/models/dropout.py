"""Dropout (Srivastava et al. 2014) that follows from a seed: what is dropped is a function of (seed, epoch, place).

Row j of a batch draws counters (position + j, block of four units, epoch, layer), so that a resumed training drops what
it would have dropped, compiled or not, whatever the batch size, and no state has to be saved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fastlth_kernels.philox import Key, philox
from torch import Tensor, nn


class Dropout(nn.Module):
    """Sets a share of a batch's features [B, F] to zero in training and scales the others up; else the identity.

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
        """Features [B, F] with a share of them zero and the others divided by what is left, in training."""
        if not self.keyed or not self.training:
            return F.dropout(x, self.rate, self.training)
        kept = self._words(x.shape[0], x.shape[1]) >= round(self.rate * 2**32)
        return torch.where(kept, x / (1.0 - self.rate), 0.0)

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
    """A linear layer on inputs of which training drops a share."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dropout: Dropout) -> None:
        super().__init__(inputs, outputs, bias)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


def add_dropout_(model: nn.Module, rate: float, key: Key) -> None:
    """Dropout on the outputs of hidden linear layers, as the inputs of the next; a net without any (VGG, ResNet) has it
    on the pooled features before its only one. In place; names of weights and their order stay as they are."""
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for number, (name, layer) in enumerate(linear[1:] or linear):
        dropout = Dropout(rate, number, key)
        dropped = DroppedLinear(layer.in_features, layer.out_features, layer.bias is not None, dropout)
        model.set_submodule(name, dropped)
