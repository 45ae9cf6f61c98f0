"""Residual nets for small images (He et al. 2016): ResNet-8, -20, -32 and -56 of the CIFAR family, and ResNet-18.

The net that Frankle & Carbin 2019 call ResNet-18 is ResNet-20 here: 16-32-64 channels, three blocks of each.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from fastlth.models.conv import GlobalAveragePool
from fastlth.models.lenet import Shape

# (channels, blocks) of each stage; every stage but the first begins by halving the image.
Stages = tuple[tuple[int, int], ...]

RESNET_8: Stages = ((16, 1), (32, 1), (64, 1))
RESNET_20: Stages = ((16, 3), (32, 3), (64, 3))
RESNET_32: Stages = ((16, 5), (32, 5), (64, 5))
RESNET_56: Stages = ((16, 9), (32, 9), (64, 9))
RESNET_18: Stages = ((64, 2), (128, 2), (256, 2), (512, 2))


class Block(nn.Module):
    """Two 3x3 convolutions around which the input goes, by a 1x1 convolution where shape or channels change."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        changes = stride != 1 or inputs != width
        self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False) if changes else nn.Identity()
        self.shortcut_bn = nn.BatchNorm2d(width) if changes else nn.Identity()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.shortcut_bn(self.shortcut(x)))
        return out


def resnet(stages: Stages, shape: Shape, classes: int) -> nn.Module:
    """A 3x3 convolution, blocks, a global average and one linear layer: input [B, *shape], logits [B, classes].

    Batch norm follows every convolution, which therefore has no bias. ResNet-18 has the form it has for CIFAR: no 7x7
    convolution and no max pool at its beginning.
    """
    channels = stages[0][0]
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(shape[0], channels, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(channels), relu1=nn.ReLU()
    )
    number = 0
    for stage, (width, blocks) in enumerate(stages):
        for i in range(blocks):
            number += 1
            layers[f"block{number}"] = Block(channels, width, stride=2 if stage and not i else 1)
            channels = width
    layers["pool"] = GlobalAveragePool()
    layers["output"] = nn.Linear(channels, classes)
    return nn.Sequential(layers)
