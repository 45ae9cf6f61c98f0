"""Pruning: score every kept weight, decide how many go, remove exactly these."""

from __future__ import annotations

from collections.abc import Mapping

from fastlth_kernels.philox import Key
from torch import Tensor

from fastlth.masks import Masks
from fastlth.pruning.criteria import CRITERIA as CRITERIA
from fastlth.pruning.scope import groups as groups
from fastlth.pruning.scope import layer_rates as layer_rates
from fastlth.pruning.select import remove_lowest
from fastlth.recipe import PruneSection


def prune(
    prune: PruneSection, masks: Masks, initial: Mapping[str, Tensor], final: Mapping[str, Tensor],
    *, numbers: Mapping[str, int], round: int, key: Key,
) -> Masks:  # fmt: skip
    """The masks of ``round``: nested in ``masks``, from the weights before and after the round before it.

    ``numbers`` gives the place of every Linear and Conv weight in the model. Returns new tensors.
    """
    scores = {n: CRITERIA[prune.criterion](initial[n], final[n]) for n in masks}
    kept = {n: int(m.sum()) for n, m in masks.items()}
    rates = {n: r for n, r in layer_rates(numbers, prune).items() if n in masks}
    new: Masks = {}
    for names, count in groups(rates, kept, prune.scope):
        new |= remove_lowest(scores, masks, names, count, numbers=numbers, round=round, key=key)
    return new
