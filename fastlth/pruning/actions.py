"""Actions: what kept (mask-1) and pruned (mask-0) weights start a round with.

A round's start is a pure function of the rewind values theta_k, the masks so far, the recipe and its seeds, so a
ticket can rebuild it. Where the mask-0 action looks at the training, one byte per weight (``zero_from``, stored in
the ticket) remembers what it saw. Names and formulas: Zhou et al. 2019, sections 4 and 5, and the authors' program;
docs/criteria.md is the table. Everything here runs on the CPU: the same bits on every machine.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from fastlth_kernels.philox import Key
from torch import Tensor

from fastlth.masks import Masks, alive
from fastlth.pruning import draws
from fastlth.recipe import PruneSection

Draw = Callable[[Key], Mapping[str, Tensor]]
"""Key -> a net's values drawn from its initial distribution, by name, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight tensor of a round about to start."""

    initial: Tensor
    """w_i: theta_k, unmasked; or what the action made of it in the round before"""
    mask: Tensor
    """bool, True = kept"""
    round: int
    number: int
    """the tensor's place in the model"""
    key: Key
    """of the stream ``prune``"""
    constant: float | None = None
    fresh: Callable[[int], Tensor] | None = None
    """the layer's values drawn afresh for a round; where not given, reinitialising permutes its own"""


def _reinit(x: Layer) -> Tensor:
    """The layer's own values in another order, or others from their distribution; anew in each round."""
    return x.fresh(x.round) if x.fresh else _permuted(x.initial, x, x.round, draws.MASK_1)


def _reshuffle(x: Layer) -> Tensor:
    """The kept values in another order at the kept places."""
    shuffled = x.initial.clone()
    places = x.mask.reshape(-1).nonzero().squeeze(1)
    values = x.initial[x.mask]
    shuffled[x.mask] = values[draws.permutation(places, x.number, x.round, x.key, draws.MASK_1)]
    return shuffled


def _constant(x: Layer) -> Tensor:
    size = _std(x.initial) if x.constant is None else x.constant
    return size * x.initial.sign()


def _shuffled_constant(x: Layer) -> Tensor:
    return _permuted(_constant(x), x, x.round, draws.MASK_1)


def _signed(x: Layer, values: Tensor) -> Tensor:
    return values.abs() * x.initial.sign()


def _rescaled(x: Layer, values: Tensor) -> Tensor:
    """Times size / kept, as if the kept weights had to do the work of all."""
    return values * (x.mask.numel() / max(int(x.mask.sum()), 1))


def _permuted(values: Tensor, x: Layer, round: int, purpose: int) -> Tensor:
    places = torch.arange(values.numel())
    return values.reshape(-1)[draws.permutation(places, x.number, round, x.key, purpose)].view(values.shape)


def _std(values: Tensor) -> float:
    """Population standard deviation; sums in float64 in the order of the elements, the same on every machine."""
    flat = values.reshape(-1).double().numpy()
    if not flat.size:
        return 0.0
    mean = np.cumsum(flat)[-1] / flat.size
    return math.sqrt(np.cumsum((flat - mean) ** 2)[-1] / flat.size)


# Values for all entries of a layer; those of pruned weights count only where the mask-0 action is original.
MASK_1: dict[str, Callable[[Layer], Tensor]] = {
    "none": lambda x: x.initial,
    "random_reinit": _reinit,
    "signed_reinit": lambda x: _signed(x, _reinit(x)),
    "random_reshuffle": _reshuffle,
    "signed_reshuffle": lambda x: _signed(x, _reshuffle(x)),
    "signed_constant": _constant,
    "rand_signed_constant": _shuffled_constant,
    "random_reinit_rescaling": lambda x: _rescaled(x, _reinit(x)),
    "signed_reinit_rescaling": lambda x: _rescaled(x, _signed(x, _reinit(x))),
    "signed_constant_rescaling": lambda x: _rescaled(x, _constant(x)),
    "rand_signed_constant_rescaling": lambda x: _rescaled(x, _shuffled_constant(x)),
    "mask_init": lambda x: x.initial.masked_fill(~x.mask, 0.0),
}


def _frozen_reinit(x: Layer) -> Tensor:
    """As random_reinit, but the same in all rounds: a frozen weight stays where it is."""
    return x.fresh(0) if x.fresh else _permuted(x.initial, x, 0, draws.FREEZE_REINIT)


# Values for the pruned weights of a layer, from its mask-1 values; None: those themselves, and they are trained.
# The four zeroing actions share one value; they differ in what becomes zero (``Movement`` below).
MASK_0: dict[str, Callable[[Layer], Tensor] | None] = {
    "mask": lambda x: torch.zeros_like(x.initial),
    "original": None,
    "freeze_init": lambda x: x.initial,
    "freeze_reinit": _frozen_reinit,
    "freeze_init_zero_mask": lambda x: x.initial,
    "freeze_init_zero_all": lambda x: x.initial,
    "freeze_init_zero_reshuffle": lambda x: x.initial,
    "freeze_init_zero_rev": lambda x: x.initial,
}


def start(
    prune: PruneSection, theta: Mapping[str, Tensor], pruned_at: Mapping[str, Tensor],
    zero_from: Mapping[str, Tensor], *, numbers: Mapping[str, int], round: int, key: Key, draw: Draw,
) -> dict[str, Tensor]:  # fmt: skip
    """What round ``round`` starts with: every parameter and buffer, on the CPU, pruned weights at their fill.

    ``theta`` is theta_k; ``pruned_at`` (uint8 per prunable weight, on the CPU) the round that it was removed in, 0 if
    in none; ``zero_from`` the same as ``zeroed`` made it (empty unless the mask-0 action zeroes); ``numbers`` the place
    of each weight in the model, ``key`` that of the stream ``prune``. Round 0 trains the dense net from ``theta``.
    ``draw`` is asked where ``prune.reinit`` is draw.
    """
    values = dict(theta)
    if round == 0:
        return values
    whole = functools.cache(lambda k: draw(draws.net_key(k, key)))

    def fresh(name: str, k: int) -> Tensor:
        return whole(k)[name]

    masks = {k: alive(pruned_at, k) for k in range(1 if prune.actions == "code" else round, round + 1)}
    for name in pruned_at:
        layer = Layer(initial=theta[name], mask=masks[round][name], round=round, number=numbers[name], key=key,
                      constant=prune.constant,
                      fresh=functools.partial(fresh, name) if prune.reinit == "draw" else None)  # fmt: skip
        value, fill = layer.initial, MASK_0[prune.mask_0]
        for k, mask in masks.items():
            value = MASK_1[prune.mask_1](dataclasses.replace(layer, initial=value, mask=mask[name], round=k))
        if fill is not None:
            frozen = dataclasses.replace(layer, initial=value) if prune.actions == "code" else layer
            value = torch.where(layer.mask, value, fill(frozen))
        if name in zero_from:
            at = zero_from[name]
            value = value.masked_fill((at > 0) & (at <= round), 0.0)
        values[name] = value
    return values


@dataclass(frozen=True, kw_only=True)
class Movement:
    """What became of one weight tensor in the round that just ended; bool tensors of its shape."""

    trained: Tensor
    """the round's mask"""
    pruned: Tensor
    """weights that the next round will be without"""
    shrank: Tensor
    """|w_i| > |w_f|"""
    grew: Tensor
    """|w_i| < |w_f|"""


ZEROING: dict[str, Callable[[Movement], Tensor]] = {
    "freeze_init_zero_mask": lambda x: x.pruned & x.shrank,
    "freeze_init_zero_all": lambda x: x.trained & x.shrank,
    "freeze_init_zero_reshuffle": lambda x: x.pruned & x.shrank,
    "freeze_init_zero_rev": lambda x: x.pruned & x.grew,
}


def zeroed(
    prune: PruneSection, zero_from: Mapping[str, Tensor], before: Masks, after: Masks,
    initial: Mapping[str, Tensor], final: Mapping[str, Tensor], *, numbers: Mapping[str, int], round: int, key: Key,
) -> dict[str, Tensor]:  # fmt: skip
    """``zero_from`` with the weights that are zero from ``round`` on: uint8, 0 = never, k = from the start of round k.

    ``before`` and ``after`` are the masks of the round that ended and of ``round``; ``initial`` and ``final`` its
    weights at its start and end. Empty for an action that does not look at them. Once decided, a weight stays.
    """
    if not prune.zeroes:
        return {}
    new = {}
    for name in before:
        trained, size, size_before = before[name].cpu(), final[name].abs().cpu(), initial[name].abs()
        movement = Movement(trained=trained, pruned=trained & ~after[name].cpu(), shrank=size_before > size,
                            grew=size_before < size)  # fmt: skip
        zero = ZEROING[prune.mask_0](movement)
        if prune.mask_0 == "freeze_init_zero_reshuffle":
            zero = _elsewhere(zero, movement.pruned, numbers[name], round, key)
        new[name] = zero_from[name].clone()
        new[name][zero] = round  # never a second time: what is zero cannot shrink, what is frozen does not move
    return new


def _elsewhere(chosen: Tensor, among: Tensor, number: int, round: int, key: Key) -> Tensor:
    """As many as ``chosen``, at random places of ``among``; bool tensors of one shape."""
    places = among.reshape(-1).nonzero().squeeze(1)
    order = draws.permutation(places, number, round, key, draws.ZERO_RESHUFFLE)
    other = torch.zeros(among.numel(), dtype=torch.bool)
    other[places[order[: int(chosen.sum())]]] = True
    return other.view(among.shape)
