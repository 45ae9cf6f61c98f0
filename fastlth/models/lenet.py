"""LeNet-300-100, also of other widths, and LeNet-5 (LeCun et al. 1998), as the lottery-ticket papers build them."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fastlth.errors import RecipeError

Shape = tuple[int, int, int]


def lenet(widths: tuple[int, int], shape: Shape, classes: int, *, batch_norm: bool = False) -> nn.Module:
    """784-300-100-10 on MNIST for widths (300, 100): input [B, *shape], logits [B, classes]. Has no convolution to
    normalise."""
    first, second = widths
    if batch_norm:
        raise RecipeError(f"model.batch_norm must be false for lenet-{first}-{second}, which has no convolutions")
    channels, height, width = shape
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(channels * height * width, first),
            relu1=nn.ReLU(),
            fc2=nn.Linear(first, second),
            relu2=nn.ReLU(),
            output=nn.Linear(second, classes),
        )
    )


def lenet_5(shape: Shape, classes: int, *, batch_norm: bool = False) -> nn.Module:
    """6 and 16 5x5 filters, 120-84-classes; the first convolution is padded, so 28x28 images suffice."""
    channels, height, width = shape
    if min(height, width) < 12:
        raise RecipeError(f"lenet-5 needs images of at least 12x12 pixels, got {height}x{width}; choose lenet-300-100")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (inputs, outputs, padding) in enumerate([(channels, 6, 2), (6, 16, 0)], start=1):
        layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, 5, padding=padding)
        if batch_norm:
            layers[f"bn{i}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"pool{i}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2), 120)
    layers["relu3"] = nn.ReLU()
    layers["fc2"] = nn.Linear(120, 84)
    layers["relu4"] = nn.ReLU()
    layers["output"] = nn.Linear(84, classes)
    return nn.Sequential(layers)
