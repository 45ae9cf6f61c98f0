"""Conv-2, -4 and -6, VGG-11, -13, -16 and -19: stacks of 3x3 convolutions with pooling between the blocks."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from fastlth.errors import RecipeError
from fastlth.models.lenet import Shape

# Channels of each block; a 2x2 max pool ends a block (Frankle & Carbin 2019, Figure 2).
CONV_2 = ((64, 64),)
CONV_4 = ((64, 64), (128, 128))
CONV_6 = ((64, 64), (128, 128), (256, 256))
# VGG (Simonyan & Zisserman 2014, table 1) for small images.
VGG_11 = ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2)
VGG_13 = ((64, 64), (128, 128), (256,) * 2, (512,) * 2, (512,) * 2)
VGG_16 = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
VGG_19 = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)

Blocks = tuple[tuple[int, ...], ...]


class GlobalAveragePool(nn.Module):
    """[B, C, H, W] -> [B, C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def conv_n(blocks: Blocks, shape: Shape, classes: int, *, batch_norm: bool = False) -> nn.Module:
    """Blocks of convolutions, then 256-256-classes; no batch norm in the paper."""
    _check_size(f"conv-{sum(map(len, blocks))}", len(blocks), shape)
    layers = _features(blocks, shape[0], batch_norm, pools=len(blocks))
    layers["flatten"] = nn.Flatten()
    inputs = blocks[-1][-1] * (shape[1] >> len(blocks)) * (shape[2] >> len(blocks))
    for i in (1, 2):
        layers[f"fc{i}"] = nn.Linear(inputs, 256)
        layers[f"fc{i}_relu"] = nn.ReLU()
        inputs = 256
    layers["output"] = nn.Linear(256, classes)
    return nn.Sequential(layers)


def vgg(blocks: Blocks, shape: Shape, classes: int) -> nn.Module:
    """VGG for small images (Liu et al. 2019): batch norm after every convolution, which therefore has no bias;
    the last block ends in a global average, and one linear layer gives the logits, without a ReLU."""
    _check_size(f"vgg{sum(map(len, blocks)) + 3}", len(blocks) - 1, shape)
    layers = _features(blocks, shape[0], True, pools=len(blocks) - 1)
    layers["pool"] = GlobalAveragePool()
    layers["output"] = nn.Linear(blocks[-1][-1], classes)
    return nn.Sequential(layers)


def _features(blocks: Blocks, channels: int, batch_norm: bool, pools: int) -> OrderedDict[str, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    i = 0
    for b, block in enumerate(blocks, start=1):
        for width in block:
            i += 1
            layers[f"conv{i}"] = nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm)
            if batch_norm:
                layers[f"bn{i}"] = nn.BatchNorm2d(width)
            layers[f"relu{i}"] = nn.ReLU()
            channels = width
        if b <= pools:
            layers[f"pool{b}"] = nn.MaxPool2d(2)
    return layers


def _check_size(name: str, pools: int, shape: Shape) -> None:
    need = 1 << pools
    if min(shape[1:]) < need:
        raise RecipeError(f"{name} halves the image {pools} times and needs at least {need}x{need} pixels, "
                          f"got {shape[1]}x{shape[2]}; choose a smaller model")  # fmt: skip
