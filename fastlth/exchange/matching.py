"""Which of their layers is which of ours: by name where all names agree, else by place, shapes deciding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Size, Tensor, nn

from fastlth.errors import TicketError
from fastlth.exchange.foreign import Foreign
from fastlth.masks import Masks, kept
from fastlth.models import state as state_of
from fastlth.models import weight_names

_ADVICE = "choose the --model, --dataset and --set that it was made with"


def masks(foreign: Foreign, model: nn.Module) -> list[Masks]:
    """One bool mask per round and weight, named and shaped as ``model``'s weights, the dense net's first.

    Raises TicketError where layers cannot be told apart by name or by place and shape.
    """
    names = _names(foreign, model)
    first = foreign.masks[0]
    for k, level in enumerate(foreign.masks):
        if _shapes(level) != _shapes(first):
            raise TicketError(f"its masks number 0 and {k} are of different layers or shapes; "
                              "give the levels of one run")  # fmt: skip
    rounds = [{names[name]: level[name] for name in first} for level in foreign.masks]
    dense = {name: torch.ones_like(mask) for name, mask in rounds[0].items()}
    return rounds if kept(rounds[0]) == kept(dense) else [dense, *rounds]


def rewind(foreign: Foreign, model: nn.Module) -> dict[str, NDArray[Any]]:
    """Every parameter and buffer of ``model``, in its shapes and dtypes. Raises TicketError where one is missing."""
    wanted = state_of(model)
    same = foreign.state.keys() == wanted.keys()
    state = foreign.state if same else _by_place(foreign.state, wanted, _names(foreign, model))
    values = {}
    for name, like in wanted.items():
        value = state[name]
        if value.shape != like.shape or value.is_floating_point() != like.is_floating_point():
            raise TicketError(f"its values for {name} have shape {list(value.shape)} and are {value.dtype}, "
                              f"the net's {list(like.shape)} and {like.dtype}; {_ADVICE}")  # fmt: skip
        values[name] = np.array(value.to(like.dtype).contiguous().numpy())
    return values


def _names(foreign: Foreign, model: nn.Module) -> dict[str, str]:
    """Their name of each Linear and Conv weight -> ours."""
    state = state_of(model)
    ours = {name: state[name].shape for name in weight_names(model)}
    theirs = _weights(foreign)
    if theirs.keys() <= ours.keys():
        names = {name: name for name in theirs}
    elif len(theirs) == len(ours):
        names = dict(zip(theirs, ours, strict=True))
    else:
        raise TicketError(f"it has {len(theirs)} Linear and Conv weights ({', '.join(theirs)}), the net has "
                          f"{len(ours)} ({', '.join(ours)}); {_ADVICE}")  # fmt: skip
    for name, shape in theirs.items():
        if shape != ours[names[name]]:
            raise TicketError(f"its {name} has shape {list(shape)}, the net's {names[name]} has "
                              f"{list(ours[names[name]])}; {_ADVICE}")  # fmt: skip
    return names


def _weights(foreign: Foreign) -> dict[str, Size]:
    """Their Linear and Conv weights in the order of their net, which a file of values knows better than masks do."""
    first = foreign.masks[0]
    for name in first:
        if first[name].dim() < 2:
            raise TicketError(f"it masks {name}, of shape {list(first[name].shape)}; a ticket has masks of Linear and "
                              "Conv weights alone, so prune only those")  # fmt: skip
    if not foreign.state:
        return _shapes(first)
    # Of the parameters of our nets' layers, only these weights have two dimensions or more.
    shapes = _shapes({name: value for name, value in foreign.state.items() if value.dim() >= 2})
    for name, mask in first.items():
        if shapes.get(name) != mask.shape:
            raise TicketError(f"its mask of {name} has no values of the same shape; "
                              "give the state_dict that the masks belong to")  # fmt: skip
    return shapes


def _by_place(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Layer by layer in order; ``names`` are those of the masks, from ``_names``.

    A convolution's bias before batch norm, which our nets do not have, goes into the running mean: the net
    computes the same.
    """
    theirs, ours = _layers(state), _layers(wanted)
    if len(theirs) != len(ours):
        raise TicketError(f"it has values for {len(theirs)} layers ({', '.join(theirs)}), the net has {len(ours)} "
                          f"({', '.join(ours)}); {_ADVICE}")  # fmt: skip
    named: dict[str, Tensor] = {}
    bias: Tensor | None = None
    for (layer, leaves), (name, needed) in zip(theirs.items(), ours.items(), strict=True):
        found = dict(leaves)
        if bias is not None:
            mean = found.get("running_mean")
            if mean is None or mean.shape != bias.shape:  # no batch norm
                raise TicketError(f"its layer before {layer} has a bias, the net's has none; {_ADVICE}")
            found["running_mean"] = mean - bias
        bias = found.pop("bias", None) if "bias" not in needed else None
        if found.keys() != needed.keys() or names.get(f"{layer}.weight", f"{name}.weight") != f"{name}.weight":
            raise TicketError(f"its layer {layer} has {', '.join(found)}, the net's {name} has "
                              f"{', '.join(needed)}; {_ADVICE}")  # fmt: skip
        named |= {f"{name}.{leaf}": value for leaf, value in found.items()}
    if bias is not None:
        raise TicketError(f"its last layer has a bias, the net's has none; {_ADVICE}")
    return named


def _layers(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """ "conv1.weight" -> "conv1" -> "weight", in order."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        layer, _, leaf = name.rpartition(".")
        layers.setdefault(layer, {})[leaf] = value
    return layers


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Size]:
    return {name: value.shape for name, value in tensors.items()}
