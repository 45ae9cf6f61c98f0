"""Scope: how many weights each layer, or all layers together, lose in a round.

Counts are ``floor(rate * kept)`` in exact arithmetic on the decimals as written; with binary floats
floor(0.1 * 30) is fine and floor(0.29 * 100) is 28.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from fractions import Fraction

from fastlth.errors import RecipeError
from fastlth.recipe import PruneSection, exact


def layer_rates(weights: Iterable[str], prune: PruneSection) -> dict[str, Fraction]:
    """Share of its kept weights each prunable layer loses per round; layers with factor 0 are left out.

    ``weights`` are names like "fc1.weight"; patterns of ``prune.only``, ``never`` and ``scale`` are matched
    against "fc1", in ``scale`` the first match wins. Raises RecipeError for a pattern that matches nothing, for
    nothing left to prune, and for global scope with unequal rates.
    """
    layers = {name: name.removesuffix(".weight") for name in weights}
    if not layers:
        raise RecipeError("the net has no prunable layer, that is no Linear and no Conv layer; give one that has")
    only, never = prune.only or (), prune.never or ()
    for setting, patterns in (("scale", prune.scale), ("only", only), ("never", never)):
        for pattern in patterns:
            if not any(fnmatchcase(layer, pattern) for layer in layers.values()):
                names = ", ".join(layers.values())
                raise RecipeError(f"prune.{setting} pattern '{pattern}' matches no layer; there are: {names}")
    rates = {
        name: exact(prune.rate) * _factor(layer, prune.scale)
        for name, layer in layers.items()
        if (not only or _matches(layer, only)) and not _matches(layer, never)
    }
    rates = {name: rate for name, rate in rates.items() if rate > 0}
    if not rates:
        settings = [f"prune.{s}" for s, given in (("only", only), ("never", never)) if given] or ["prune.scale"]
        todo = "let a pattern leave a layer" if only or never else "give at least one layer a factor above 0"
        leave = "leave" if len(settings) > 1 else "leaves"
        raise RecipeError(f"{' and '.join(settings)} {leave} no layer to prune; {todo}")
    if prune.scope == "global" and len(set(rates.values())) > 1:
        raise RecipeError("prune.scope global ranks all layers together and needs one rate; "
                          "make all factors of prune.scale 1 or 0, or use scope layer")  # fmt: skip
    return rates


def _matches(layer: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(layer, pattern) for pattern in patterns)


def _factor(layer: str, scale: Mapping[str, float]) -> Fraction:
    return next((exact(f) for pattern, f in scale.items() if fnmatchcase(layer, pattern)), Fraction(1))


def groups(rates: Mapping[str, Fraction], kept: Mapping[str, int], scope: str) -> list[tuple[list[str], int]]:
    """Which tensors are ranked together, and how many of their kept weights go."""
    if scope == "global":
        rate = next(iter(rates.values()))
        return [(list(rates), int(rate * sum(kept[n] for n in rates)))]
    return [([name], int(rate * kept[name])) for name, rate in rates.items()]
