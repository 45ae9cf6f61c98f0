"""R nets of one kind as one net: batched products for fully connected layers, grouped convolutions for convolutions.

    images, fully connected layers    [R, B, K]
    convolutions, pooling             [B, R C, H, W], channels-last: the R nets' channels lie side by side

A parameter of the batched net holds the R nets' one after the other along its first dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastlth_kernels.bitmask import pack
from fastlth_kernels.masked_linear import masked_linear
from torch import Tensor, nn

from fastlth.models import skeleton
from fastlth.recipe import Recipe

BEFORE, BEHIND = {nn.Conv2d, nn.MaxPool2d, nn.ReLU}, {nn.Linear, nn.ReLU}
"""what may come before and behind the one Flatten"""


def unsupported(recipe: Recipe) -> str | None:
    """Why nets of the recipe cannot be one, as a clause; None if they can."""
    kinds = [type(m) for m in skeleton(recipe).children()]
    at = kinds.index(nn.Flatten) if nn.Flatten in kinds else len(kinds)
    if not set(kinds[:at]) <= BEFORE or not set(kinds[at + 1 :]) <= BEHIND or kinds[-1:] != [nn.Linear]:
        return f"{recipe.model.name} is not a stack of convolutions, max pooling, ReLU and fully connected layers"
    if at and recipe.compute.kernels == "triton":
        return "the masked convolutions (--kernels triton) are not batched"
    return None


class BatchedLinear(nn.Module):
    """y[r] = x[r] W[r]^T + b[r]: x [R, B, K], y [R, B, N]. With ``bits`` the weights are masked as they are read."""

    bits: Tensor | None

    def __init__(self, layers: Sequence[nn.Linear], masked: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([m.weight.detach() for m in layers]))
        self.bias = nn.Parameter(torch.stack([m.bias.detach() for m in layers]))
        whole = torch.ones(self.weight.shape, dtype=torch.bool)
        self.register_buffer("bits", pack(whole) if masked else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is not None:
            y: Tensor = masked_linear(x, self.weight, self.bits, self.bias)
            return y
        # the weights come first: autograd then makes their gradients in their own layout, and nobody copies them
        return torch.baddbmm(self.bias[:, :, None], self.weight, x.mT).mT


class Apart(nn.Module):
    """[B, R C, H, W] -> [R, B, C H W]."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self._count, -1, *x.shape[2:]).transpose(0, 1).flatten(2)


def side_by_side(images: Tensor, count: int) -> Tensor:
    """Images [R B, C, H, W] of R nets -> [B, R C, H, W], channels-last."""
    rows = images.permute(0, 2, 3, 1)
    rows = rows.reshape(count, -1, *rows.shape[1:])  # [R, B, H, W, C]
    return rows.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)


def batch(nets: Sequence[nn.Module], masked: bool) -> nn.Sequential:
    """``nets`` as one, with copies of their parameters under their names. Its input is as the first layer's above."""
    layers = nn.Sequential()
    for name, module in nets[0].named_children():
        same = [net.get_submodule(name) for net in nets]
        if isinstance(module, nn.Linear):
            layers.add_module(name, BatchedLinear(same, masked))  # type: ignore[arg-type]
        elif isinstance(module, nn.Conv2d):
            layers.add_module(name, _grouped(same))  # type: ignore[arg-type]
        elif not isinstance(module, nn.Flatten):
            layers.add_module(name, module)
        elif len(layers):
            layers.add_module(name, Apart(len(nets)))
    return layers


def _grouped(layers: Sequence[nn.Conv2d]) -> nn.Conv2d:
    one, count = layers[0], len(layers)
    made = nn.Conv2d(
        count * one.in_channels, count * one.out_channels, one.kernel_size, one.stride,  # type: ignore[arg-type]
        one.padding, groups=count, bias=one.bias is not None, device="meta",  # type: ignore[arg-type]
    )  # fmt: skip
    made.weight = nn.Parameter(torch.cat([m.weight.detach() for m in layers]))
    if one.bias is not None:
        made.bias = nn.Parameter(torch.cat([m.bias.detach() for m in layers if m.bias is not None]))
    return made
