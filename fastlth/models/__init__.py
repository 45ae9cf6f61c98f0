"""The nets of the papers, and their initial values."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from fastlth_kernels.philox import Key
from torch import Tensor, nn

from fastlth.catalogue import lenet_widths
from fastlth.errors import TicketError
from fastlth.models import conv, own, resnet
from fastlth.models.dropout import add_dropout_
from fastlth.models.init import INIT_VERSION as INIT_VERSION
from fastlth.models.init import LAYERS as LAYERS
from fastlth.models.init import initialise_, weight_std
from fastlth.models.lenet import Shape, lenet, lenet_5
from fastlth.recipe import Recipe

# name -> builder(image shape, classes, batch norm asked for) of all but lenet-A-B; VGGs and ResNets have batch norm in
# any case
MODELS: dict[str, Callable[[Shape, int, bool], nn.Module]] = {
    "lenet-5": lambda shape, classes, norm: lenet_5(shape, classes, batch_norm=norm),
    "conv-2": lambda shape, classes, norm: conv.conv_n(conv.CONV_2, shape, classes, batch_norm=norm),
    "conv-4": lambda shape, classes, norm: conv.conv_n(conv.CONV_4, shape, classes, batch_norm=norm),
    "conv-6": lambda shape, classes, norm: conv.conv_n(conv.CONV_6, shape, classes, batch_norm=norm),
    "vgg11": lambda shape, classes, _: conv.vgg(conv.VGG_11, shape, classes),
    "vgg13": lambda shape, classes, _: conv.vgg(conv.VGG_13, shape, classes),
    "vgg16": lambda shape, classes, _: conv.vgg(conv.VGG_16, shape, classes),
    "vgg19": lambda shape, classes, _: conv.vgg(conv.VGG_19, shape, classes),
    "resnet-8": lambda shape, classes, _: resnet.resnet(resnet.RESNET_8, shape, classes),
    "resnet-20": lambda shape, classes, _: resnet.resnet(resnet.RESNET_20, shape, classes),
    "resnet-32": lambda shape, classes, _: resnet.resnet(resnet.RESNET_32, shape, classes),
    "resnet-56": lambda shape, classes, _: resnet.resnet(resnet.RESNET_56, shape, classes),
    "resnet-18": lambda shape, classes, _: resnet.resnet(resnet.RESNET_18, shape, classes),
}


def make(name: str, shape: Shape, classes: int, batch_norm: bool) -> nn.Module:
    """The net of a name that ``catalogue.model_name`` gave. Raises RecipeError if it does not fit the images."""
    widths = lenet_widths(name)
    if widths is not None:
        return lenet(widths, shape, classes, batch_norm=batch_norm)
    return MODELS[name](shape, classes, batch_norm)


def skeleton(recipe: Recipe) -> nn.Module:
    """The recipe's net on the meta device: shapes and names, no values. Raises RecipeError if it does not fit
    the images."""
    if recipe.model.own:
        return own.outline(recipe)
    facts = recipe.data.facts
    with torch.device("meta"):
        model = make(recipe.model.name, facts.shape, facts.classes, recipe.model.batch_norm)
        if recipe.model.dropout:
            add_dropout_(model, recipe.model.dropout, recipe.seeds.key("dropout"))
    return model


def build(recipe: Recipe) -> nn.Module:
    """The recipe's net on the CPU with theta0 in it, float32."""
    return draw(recipe, recipe.seeds.key("init"))


def draw(recipe: Recipe, key: Key) -> nn.Module:
    """The recipe's net on the CPU with values drawn from its initial distribution: theta0 if the key is its own."""
    if recipe.model.own:
        model = own.construct(recipe, key)
    else:
        model = skeleton(recipe).to_empty(device="cpu")
    if not recipe.model.own_values:
        how = recipe.model
        initialise_(model, key, how.bias_init, weights=how.weight_init, std=how.weight_std, norm=how.norm_init)
    return model


def loaded(recipe: Recipe, values: Mapping[str, Tensor]) -> nn.Module:
    """The recipe's net on the CPU with these values, by the names of ``state``; all of them, and no others."""
    model = own.construct(recipe, (0, 0)) if recipe.model.own else skeleton(recipe).to_empty(device="cpu")
    tensors = state(model)
    wrong = [name for name in tensors.keys() | values.keys()
             if name not in tensors or name not in values or tensors[name].shape != values[name].shape]  # fmt: skip
    if wrong:
        raise TicketError(f"the values are not of this net, which differs from them in {', '.join(sorted(wrong))}; "
                          "take the net they were saved from")  # fmt: skip
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as ``state_dict`` names them, detached; a tensor that layers share once, by its first
    name."""
    named: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            named.setdefault(id(tensor), (name, tensor.detach()))
    return dict(named.values())


def weight_stds(recipe: Recipe) -> dict[str, float]:
    """Standard deviation of the initial distribution of each Linear and Conv weight, in model order; of nets whose
    values are drawn here, not by their own constructor."""
    model, how = skeleton(recipe), recipe.model
    return {
        name: weight_std(model.get_parameter(name).shape, how.weight_init) if how.weight_std is None else how.weight_std
        for name in weight_names(model)
    }


def weight_names(model: nn.Module) -> list[str]:
    """Names of the weights of all Linear and Conv layers, in model order; a shared weight once."""
    weights = {id(m.weight) for m in model.modules() if isinstance(m, LAYERS)}
    return [name for name, p in model.named_parameters() if id(p) in weights]
