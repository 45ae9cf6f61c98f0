"""The nets of the papers, and their initial values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastlth.catalogue import DATASETS
from fastlth.models.conv import CONV_2, CONV_4, CONV_6, VGG_19, conv_n, vgg
from fastlth.models.dropout import add_dropout_
from fastlth.models.init import INIT_VERSION as INIT_VERSION
from fastlth.models.init import initialise_
from fastlth.models.lenet import Shape, lenet_5, lenet_300_100
from fastlth.recipe import Recipe

# name -> builder(image shape, classes, batch norm asked for); vgg19 has batch norm in any case
MODELS: dict[str, Callable[[Shape, int, bool], nn.Module]] = {
    "lenet-300-100": lambda shape, classes, norm: lenet_300_100(shape, classes, batch_norm=norm),
    "lenet-5": lambda shape, classes, norm: lenet_5(shape, classes, batch_norm=norm),
    "conv-2": lambda shape, classes, norm: conv_n(CONV_2, shape, classes, batch_norm=norm),
    "conv-4": lambda shape, classes, norm: conv_n(CONV_4, shape, classes, batch_norm=norm),
    "conv-6": lambda shape, classes, norm: conv_n(CONV_6, shape, classes, batch_norm=norm),
    "vgg19": lambda shape, classes, _: vgg(VGG_19, shape, classes),
}


def skeleton(recipe: Recipe) -> nn.Module:
    """The recipe's net on the meta device: shapes and names, no values. Raises RecipeError if it does not fit
    the images."""
    facts = DATASETS[recipe.data.name]
    with torch.device("meta"):
        model = MODELS[recipe.model.name](facts.shape, facts.classes, recipe.model.batch_norm)
        if recipe.model.dropout:
            add_dropout_(model, recipe.model.dropout, recipe.seeds.key("dropout"))
    return model


def build(recipe: Recipe) -> nn.Module:
    """The recipe's net on the CPU with theta0 in it, float32."""
    model = skeleton(recipe).to_empty(device="cpu")
    initialise_(model, recipe.seeds.key("init"), recipe.model.bias_init)
    return model


def weight_names(model: nn.Module) -> list[str]:
    """Names of the weights of all Linear and Conv layers, in model order; a shared weight once."""
    weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return [name for name, p in model.named_parameters() if id(p) in weights]
