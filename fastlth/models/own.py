"""Nets that fastlth does not know: a function of another package, torchvision's and timm's.

A net is made by its function on the CPU, every time it is needed, from one state of torch's generator per seed; the
layers and shapes it had when its recipe was composed are held in ``model.content``.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from fastlth_kernels.philox import Key, philox
from torch import Tensor, nn

from fastlth import specs
from fastlth.catalogue import DatasetFacts
from fastlth.errors import RecipeError
from fastlth.models.dropout import add_dropout_
from fastlth.models.init import LAYERS
from fastlth.recipe import Recipe

_GENERATOR = threading.Lock()  # torch's generator belongs to the process, and replicates may run side by side


def construct(recipe: Recipe, key: Key) -> nn.Module:
    """The recipe's net on the CPU with the values that its function gives it when torch's generator starts at ``key``.

    Raises RecipeError if it cannot be made, or is not the net that the recipe was composed for.
    """
    name = recipe.model.name
    net = _made(name, recipe.data.facts, key)
    if content(net) != recipe.model.content:
        raise RecipeError(f"{name} now makes a net of other layers or shapes than the recipe's "
                          f"({content(net)[:8]}, not {str(recipe.model.content)[:8]}); restore it, or start a new "
                          "search")  # fmt: skip
    if recipe.model.dropout:
        add_dropout_(net, recipe.model.dropout, recipe.seeds.key("dropout"))
    return net


def outline(recipe: Recipe) -> nn.Module:
    """The same on the meta device, where only shapes and names are needed; quick where the function allows it."""
    try:
        with torch.device("meta"):
            return construct(recipe, (0, 0))
    except RecipeError:
        return construct(recipe, (0, 0))  # it looks at values; these are as good as any


def describe(name: str, facts: DatasetFacts) -> str:
    """``model.content`` of net ``name`` on images of these facts. Raises RecipeError for a net that cannot be made,
    has no prunable layer, or does not make logits of such images."""
    net = _made(name, facts, (0, 0))
    if not any(isinstance(m, LAYERS) for m in net.modules()):
        raise RecipeError(f"{name} has no prunable layer, that is no Linear and no Conv layer; give a net that has")
    wrong = [n for n, t in net.named_parameters() if t.dtype != torch.float32]
    if wrong:
        raise RecipeError(f"{name} has parameters of another type than float32 ({', '.join(wrong)}); make them float32")
    image, want = "x".join(map(str, facts.shape)), [2, facts.classes]
    try:
        with _seeded((0, 0)):
            logits: Any = net.train()(torch.zeros(2, *facts.shape))
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if got == want:
            F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # of code that is not ours
        raise RecipeError(f"{name} cannot be trained on images of {image}: {' '.join(str(error).split())}") from error
    if got != want:
        raise RecipeError(f"{name} gives {got} for two images of {image} and {facts.classes} classes; "
                          f"it must give logits of shape {want}")  # fmt: skip
    return content(net)


def content(net: nn.Module) -> str:
    """sha256 (hex) of the kinds of all layers and the names, shapes and types of all parameters and buffers."""
    sha = hashlib.sha256()
    for name, module in net.named_modules(remove_duplicate=False):
        sha.update(f"{name} {type(module).__name__}\n".encode())
    for name, tensor in net.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            sha.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
    return sha.hexdigest()


def _made(name: str, facts: DatasetFacts, key: Key) -> nn.Module:
    try:
        with _seeded(key):
            net = _from_library(name, facts) if specs.library(name) else _from_function(name, facts)
    except RecipeError:
        raise
    except Exception as error:  # of code that is not ours
        raise RecipeError(f"{name} failed ({type(error).__name__}: {' '.join(str(error).split())})") from error
    if not isinstance(net, nn.Module):
        raise RecipeError(f"{name} returns an object of type {type(net).__name__}; it must return a torch.nn.Module")
    if not specs.library(name):
        net.register_forward_pre_hook(_plain)
    return net


def _from_function(name: str, facts: DatasetFacts) -> Any:
    function = specs.find(name)
    if isinstance(function, nn.Module):
        raise RecipeError(f"{name} is a net; give the name of a function or class that makes one")
    offered: dict[str, Any] = {"shape": facts.shape, "classes": facts.classes}
    parameters = inspect.signature(function).parameters.values()
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in offered
               and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]  # fmt: skip
    if missing:
        raise RecipeError(f"{name} asks for {', '.join(missing)}; it may ask for shape and classes, everything else "
                          "needs a default")  # fmt: skip
    net = function(**{p.name: offered[p.name] for p in parameters if p.name in offered})
    return copy.deepcopy(net)  # a function that keeps its net must not see ours trained


def _from_library(name: str, facts: DatasetFacts) -> nn.Module:
    library, model = specs.library(name) or ("", "")
    if library == "timm":
        try:
            import timm
        except ImportError:
            raise RecipeError(f"{name} needs the timm package; install timm, or take a net of torchvision") from None
        net: nn.Module = timm.create_model(model, pretrained=False, num_classes=facts.classes, in_chans=facts.shape[0])
        return net
    from torchvision.models import get_model, list_models

    if model not in list_models():
        raise RecipeError(f"torchvision has no model '{model}'; torchvision.models.list_models() names all")
    net = get_model(model, weights=None, num_classes=facts.classes)
    _fit_channels(net, facts.shape[0])
    return net


def _fit_channels(net: nn.Module, channels: int) -> None:
    """Another first convolution where the images have not the three channels it is made for."""
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            if layer.in_channels != channels:
                same = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
                options: dict[str, Any] = {name: getattr(layer, name) for name in same}
                new = nn.Conv2d(channels, layer.out_channels, bias=layer.bias is not None, **options)
                net.set_submodule(name, new)
            return


def _plain(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Images in the order that ``x.view(len(x), -1)`` expects; ours come as channels-last views."""
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in inputs)


@contextmanager
def _seeded(key: Key) -> Iterator[None]:
    """torch's CPU generator starts at ``key`` inside, and is as it was afterwards."""
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(0, 0, key))
        yield


def seed_of(a: int, b: int, key: Key) -> int:
    """A seed for torch's generator, a function of two counters and a key."""
    low, high, _, _ = philox(a, b, 0, 0, key)
    return int(high) << 31 ^ int(low)
