"""Pruning: score every kept weight, decide how many go, remove exactly these; what the next round starts with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastlth_kernels.philox import Key
from torch import Tensor

from fastlth.catalogue import SIGN_TESTS
from fastlth.errors import DivergedError
from fastlth.masks import Masks
from fastlth.pruning import magnitude
from fastlth.pruning.criteria import CRITERIA as CRITERIA
from fastlth.pruning.criteria import Inputs
from fastlth.pruning.scope import groups as groups
from fastlth.pruning.scope import layer_rates as layer_rates
from fastlth.pruning.select import remove_lowest
from fastlth.recipe import PruneSection

Gradients = Callable[[], Mapping[str, Tensor]]
"""dL/dw of every weight at the values a round started with, over the training images"""


def prune(
    prune: PruneSection, masks: Masks, initial: Mapping[str, Tensor], final: Mapping[str, Tensor],
    *, numbers: Mapping[str, int], round: int, key: Key, gradients: Gradients | None = None,
) -> Masks:  # fmt: skip
    """The masks of ``round``: nested in ``masks``, from the weights before and after the round before it.

    ``numbers`` gives the place of every Linear and Conv weight in the model; ``gradients`` is called where the
    criterion needs it. Returns new tensors. Raises DivergedError if a kept weight or score is NaN.
    """
    broken = [n for n, m in masks.items() if bool((final[n].isnan() & m).any())]
    if broken:
        raise DivergedError(f"weights of {', '.join(broken)} are NaN; they cannot be ranked (try a lower --lr)")
    kept = {n: int(m.sum()) for n, m in masks.items()}
    rates = {n: r for n, r in layer_rates(numbers, prune).items() if n in masks}
    ranked = groups(rates, kept, prune.scope)
    new: Masks = {}
    if magnitude.usable(prune, {n: final[n] for n in masks}):
        for names, count in ranked:
            new |= magnitude.remove_smallest(final, masks, names, count, numbers=numbers, round=round, key=key)
        return new
    slopes = gradients() if gradients and prune.needs_gradients else None
    scores = {n: _score(prune, n, m, initial[n], final[n], slopes) for n, m in masks.items()}
    if prune.criterion in SIGN_TESTS:
        return {n: m & scores[n] for n, m in masks.items()}
    for names, count in ranked:
        new |= remove_lowest(scores, masks, names, count, numbers=numbers, round=round, key=key)
    return new


def _score(
    prune: PruneSection, name: str, kept: Tensor, initial: Tensor, final: Tensor, slopes: Mapping[str, Tensor] | None
) -> Tensor:
    inputs = Inputs(
        initial=initial.to(final.device), final=final, kept=kept,
        gradient=(lambda: slopes[name].to(final.device)) if slopes is not None else None,
        alpha=prune.alpha, code=prune.formulas == "code",
    )  # fmt: skip
    return CRITERIA[prune.criterion](inputs)
