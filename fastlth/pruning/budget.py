"""Budget: how many weights each group of layers keeps when a net is pruned in one step.

A budget is a list of (names ranked together, weights kept of them). Counts are exact; what floor leaves over goes to
the layers with the largest fractions (largest remainder), the first one first where they are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from fastlth_kernels.philox import Key
from torch import Tensor

from fastlth.errors import RecipeError, unknown
from fastlth.masks import Masks, full
from fastlth.pruning.scope import groups, layer_rates
from fastlth.pruning.select import remove_lowest
from fastlth.recipe import PruneSection, exact

Budget = list[tuple[list[str], int]]
Shapes = Mapping[str, Sequence[int]]

STRATEGIES = ("layer", "global", "even", "erk")


def one_shot_rate(shapes: Shapes, prune: PruneSection, density: float | Fraction) -> float:
    """The smallest ``prune.rate`` with which one round ends at or below ``density``; the layers' factors stay.

    ``shapes`` are those of all Linear and Conv weights; a float is the decimal it is written as. Frankle & Carbin 2019
    (section 2) prune their one-shot LeNets so: hidden layers at p, the output layer at p / 2.

    Raises RecipeError where no rate below 1 gets there.
    """
    rate = _one_shot_rate(shapes, prune, density)
    if rate >= 1:
        raise RecipeError(f"density {float(density):g} cannot be reached in one step: by these factors of prune.scale "
                          f"prune.rate would have to be {rate:.3g}, and must be below 1; ask for more, or change "
                          "prune.scale")  # fmt: skip
    return rate


def _one_shot_rate(shapes: Shapes, prune: PruneSection, density: float | Fraction) -> float:
    """As above, but 1 or more where all factors are so small."""
    gone = _removed(shapes, layer_rates(shapes, prune), density)
    factors = {n: rate / exact(prune.rate) for n, rate in layer_rates(shapes, prune).items()}
    sizes = {n: math.prod(shapes[n]) for n in factors}

    def removed(rate: Fraction) -> int:
        return sum(count for _, count in groups({n: f * rate for n, f in factors.items()}, sizes, prune.scope))

    # Between two of these numbers' multiples no floor changes.
    shares = [factors[n] * sizes[n] for n in factors]
    steps = [sum(shares)] if prune.scope == "global" else shares
    exactly = Fraction(gone) / sum(shares)
    while removed(exactly) < gone:
        exactly = min(Fraction(exactly * step // 1 + 1) / step for step in steps)
    rate = float(exactly)
    while exact(rate) < exactly:
        rate = math.nextafter(rate, math.inf)
    if exact(rate) * max(factors.values()) >= 1:
        raise RecipeError(f"density {float(density):g} cannot be reached in one step: by these factors of prune.scale "
                          "a layer would have to lose everything; ask for more, or change prune.scale")  # fmt: skip
    return rate


def of_density(strategy: str, shapes: Shapes, prune: PruneSection, density: float) -> Budget:
    """What a net keeps at ``density``: at most this share of all Linear and Conv weights, and as near as counts allow.

    ``layer`` prunes each layer alone by its rate in one step, whatever the recipe's scope; for the others see
    ``of_total``.
    """
    rates = layer_rates(shapes, prune)
    sizes = {n: math.prod(shapes[n]) for n in rates}
    if strategy != "layer":
        return of_total(strategy, {n: shapes[n] for n in rates}, sum(sizes.values()) - _removed(shapes, rates, density))
    rate = exact(_one_shot_rate(shapes, replace(prune, scope="layer"), density)) / exact(prune.rate)
    cut = groups({n: r * rate for n, r in rates.items()}, sizes, "layer")
    return [(names, sum(sizes[n] for n in names) - count) for names, count in cut]


def of_total(strategy: str, shapes: Shapes, total: int) -> Budget:
    """How ``total`` kept weights are spread over the layers of ``shapes``, all of which may be pruned.

    ``global`` ranks all together; ``even`` gives every layer the same density; ``erk`` is Erdos-Renyi-Kernel (Evci et
    al. 2020, section 3): a layer's number of weights is proportional to inputs + outputs + kernel height + width.
    Raises RecipeError for a total that is not there.
    """
    sizes = {n: math.prod(shape) for n, shape in shapes.items()}
    if not 1 <= total <= sum(sizes.values()):
        raise RecipeError(f"{total} weights cannot be kept of {sum(sizes.values())}; choose another density")
    match strategy:
        case "global":
            return [(list(shapes), total)]
        case "even":
            counts = _proportional(sizes, sizes, total)
        case "erk":
            counts = _proportional({n: sum(shape) for n, shape in shapes.items()}, sizes, total)
        case _:
            raise RecipeError(unknown("strategy", strategy, STRATEGIES))
    return [([n], count) for n, count in counts.items()]


def of_masks(masks: Masks, scope: str = "layer") -> Budget:
    """What ``masks`` keep, per layer or over all of them."""
    counts = {n: int(m.sum()) for n, m in masks.items()}
    return [(list(counts), sum(counts.values()))] if scope == "global" else [([n], c) for n, c in counts.items()]


def keep_highest(
    scores: Mapping[str, Tensor], budget: Budget, *, numbers: Mapping[str, int], round: int, key: Key
) -> Masks:
    """Masks that keep exactly what ``budget`` says: the highest scores, ties at random by ``key``.

    Equal scores everywhere make a mask that is uniformly random. Raises DivergedError for a NaN.
    """
    masks = full(scores)
    new: Masks = {}
    for names, kept in budget:
        count = sum(masks[n].numel() for n in names) - kept
        new |= remove_lowest(scores, masks, names, count, numbers=numbers, round=round, key=key)
    return {n: new[n] for n in scores}


def random_masks(shapes: Shapes, budget: Budget, *, numbers: Mapping[str, int], round: int, key: Key) -> Masks:
    """Masks drawn uniformly from all that fit ``budget``."""
    scores = {n: torch.zeros(tuple(shape)) for n, shape in shapes.items()}
    return keep_highest(scores, budget, numbers=numbers, round=round, key=key)


def _removed(shapes: Shapes, prunable: Mapping[str, object], density: float | Fraction) -> int:
    """How many weights must go so that at most ``density`` of all is left."""
    sizes = {n: math.prod(shape) for n, shape in shapes.items()}
    everything, removable = sum(sizes.values()), sum(sizes[n] for n in prunable)
    gone = removable
    if 0 < density < 1:
        share = density if isinstance(density, Fraction) else exact(density)
        gone = everything - math.floor(share * everything)
    if gone >= removable:
        least = (everything - removable + 1) / everything
        raise RecipeError(f"a density must be below 1 and leave a weight of the layers that are pruned (at least "
                          f"{least:.3g}), got {float(density):g}")  # fmt: skip
    return gone


def _proportional(weight: Mapping[str, int], size: Mapping[str, int], total: int) -> dict[str, int]:
    """Whole numbers that add up to ``total``, proportional to ``weight`` but nowhere above ``size``."""
    counts: dict[str, int] = {}
    free = dict(weight)
    while free:
        unit = Fraction(total - sum(counts.values()), sum(free.values()))
        over = [n for n, w in free.items() if unit * w >= size[n]]
        if not over:
            break
        for name in over:
            counts[name] = size[name]
            del free[name]
    if free:
        shares = {n: unit * w for n, w in free.items()}
        counts |= {n: int(share) for n, share in shares.items()}
        rest = total - sum(counts.values())
        for name in sorted(shares, key=lambda n: counts[n] - shares[n])[:rest]:
            counts[name] += 1
    return {n: counts[n] for n in weight}
