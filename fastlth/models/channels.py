"""Units that a masked net could do without, and how little work would be left without them.

Two kinds, in nets that are a chain of layers. *Unread*: no kept weight leads from the unit to a unit that is read;
nothing that happens in it reaches the logits. *Silent*: no kept weight leads to it from a unit that is not silent, and
what is added before its ReLU (batch norm's shift, or the layer's bias) is at most 0; so it gives 0, its gradient is 0,
and it stays silent while the round lasts, provided that weight decay moves a shift towards 0 and never across
(``decay_keeps_signs``; where it may cross, only a shift of 0 is silent). Leaving both out changes no logit and no
gradient. Their weights still decay and are ranked in the next round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fastlth.recipe import TrainSection

Array = NDArray[Any]
Flags = NDArray[np.bool_]

STEP = 32  # channels: what tensor cores compute anyway


@dataclass(frozen=True)
class Link:
    """One Linear or Conv2d layer of a chain and what stands between it and the next."""

    name: str
    bias: str | None
    norm: str | None
    """the batch norm behind it"""
    gated: bool
    """a ReLU follows"""
    eps: float = 0.0


def links(model: nn.Module) -> list[Link] | None:
    """The layers of a net in which each reads the one before and nothing else; None for any other net."""
    if not isinstance(model, nn.Sequential):
        return None
    found: list[Link] = []
    for name, module in model.named_children():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if isinstance(module, nn.Conv2d) and module.groups != 1:
                return None
            found.append(Link(name, f"{name}.bias" if module.bias is not None else None, None, False))
        elif found and isinstance(module, nn.BatchNorm2d | nn.ReLU):
            last = found.pop()
            norm, eps = (name, module.eps) if isinstance(module, nn.BatchNorm2d) else (last.norm, last.eps)
            found.append(Link(last.name, last.bias, norm, last.gated or isinstance(module, nn.ReLU), eps))
        elif any(True for _ in module.parameters()):
            return None
    return found


@dataclass(frozen=True, eq=False)
class Removable:
    """Of one layer's units, bool [outputs] each."""

    unread: Flags
    silent: Flags

    @property
    def either(self) -> Flags:
        return self.unread | self.silent


def decay_keeps_signs(train: TrainSection) -> bool:
    """Whether weight decay alone, from a fresh optimizer, moves a parameter towards 0 and never across it.

    Adam's does cross: where the decay is the whole gradient, a step is as long as the learning rate. With SGD, learning
    rate times decay a and momentum m, parameter u and momentum buffer n <= c u keep their signs if a c > 0 exists with
    m c + decay <= c (1 - lr (m c + decay)): the roots of a quadratic. A lower rate later in the schedule is as good.
    """
    a, m = train.lr * train.weight_decay, train.momentum
    if train.optimizer == "adam":
        return a == 0
    if train.optimizer == "adamw":
        return a <= 1
    slack = 1 - m - a * (1 + m * train.nesterov)
    return slack >= 0 and slack**2 >= 4 * a * (m * m if train.nesterov else m)


def removable(
    chain: Sequence[Link], masks: Mapping[str, Flags], start: Mapping[str, Array], *, signs_stay: bool = True
) -> dict[str, Removable]:
    """By layer name. masks: of every weight of the chain, [outputs, inputs, ...kernel]; start: what the round starts
    with, parameters and buffers by their names; signs_stay: ``decay_keeps_signs`` of what it trains with."""
    kept = {link.name: _between_units(masks[f"{link.name}.weight"]) for link in chain}
    silent: dict[str, Flags] = {}
    speaking: Flags = np.ones(kept[chain[0].name].shape[1], bool)  # the image is never silent
    for link in chain:
        k = kept[link.name]
        heard = _any(k & np.repeat(speaking, k.shape[1] // len(speaking)), 1)
        silent[link.name] = ~heard & _held_at_zero(link, start, len(k), signs_stay)
        speaking = ~silent[link.name]
    read: Flags = np.ones(len(speaking), bool)  # logits
    unread = {chain[-1].name: ~read}
    for link, behind in reversed(list(pairwise(chain))):
        inputs = _any(kept[behind.name] & read[:, None], 0)
        read = _any(inputs.reshape(len(kept[link.name]), -1), 1)
        unread[link.name] = ~read
    return {link.name: Removable(unread[link.name], silent[link.name]) for link in chain}


def _between_units(mask: Flags) -> Flags:
    return _any(mask.reshape(*mask.shape[:2], -1), 2)


def _any(flags: Flags, axis: int) -> Flags:
    found: Flags = np.asarray(flags.any(axis))
    return found


def _held_at_zero(link: Link, start: Mapping[str, Array], units: int, signs_stay: bool) -> Flags:
    """Whether a unit that hears nothing gives 0, in training and in evaluation."""
    if not link.gated:
        return np.zeros(units, bool)
    bias = start[link.bias].astype(np.float64) if link.bias else np.zeros(units)
    if link.norm is None:
        low: Flags = np.less_equal(bias, 0) if signs_stay else np.equal(bias, 0)
        return low
    # In evaluation batch norm takes away the running mean, which goes to 0, the unit's constant in training; at both
    # ends the result is at most 0, and so is all that lies between. (Another constant would not cancel exactly.)
    scale, shift, mean, variance = (
        start[f"{link.norm}.{n}"].astype(np.float64) for n in ("weight", "bias", "running_mean", "running_var")
    )
    evaluated = shift - scale * mean / np.sqrt(variance + link.eps)
    constant = (shift == 0) & (mean == 0)  # whatever becomes of the scale
    held: Flags = (bias == 0) & ((shift <= 0) & (evaluated <= 0) if signs_stay else constant)
    return held


def work_left(model: nn.Module, shape: tuple[int, int, int], gone: Mapping[str, Flags], step: int = 1) -> float:
    """Share of a forward pass's multiplications that is left without the units ``gone`` (bool [outputs] by layer),
    channels rounded up to multiples of ``step``, but to no more than there were. ``model`` is on the meta device."""
    whole, left, before = 0, 0, 1.0
    for name, (outputs, inputs, places) in _sizes(model, shape).items():
        stays = min(outputs, -(-int((~gone[name]).sum()) // step) * step)
        whole += outputs * inputs * places
        left += round(stays * inputs * before) * places
        before = stays / outputs
    return left / whole if whole else 1.0


def _sizes(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, tuple[int, int, int]]:
    """Layer -> (outputs, weights per output, places at which each is computed)."""
    found: dict[str, tuple[int, int, int]] = {}

    def note(name: str, layer: nn.Linear | nn.Conv2d) -> Any:
        def hook(_module: Any, _inputs: Any, out: torch.Tensor) -> None:
            found[name] = (len(layer.weight), layer.weight[0].numel(), out[0].numel() // len(layer.weight))

        return hook

    handles = [m.register_forward_hook(note(n, m)) for n, m in model.named_modules()
               if isinstance(m, nn.Linear | nn.Conv2d)]  # fmt: skip
    with torch.no_grad():
        model.eval()(torch.empty(1, *shape, device="meta"))
    for handle in handles:
        handle.remove()
    return found
