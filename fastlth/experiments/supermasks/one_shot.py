"""One-shot supermasks (Zhou et al. 2019, section 5.1): a mask read off a trained net, put on its untrained weights.

At power p each layer keeps what p prunings at its rate would leave, chosen all at once by a criterion; the net is
evaluated without training, with its initial weights and with their signed constants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from fastlth_kernels.philox import Key
from torch import Tensor

from fastlth import masks as mask_tools
from fastlth.experiments.supermasks.net import signed_constant
from fastlth.experiments.supermasks.plan import Plan
from fastlth.masks import Masks
from fastlth.pruning import layer_rates
from fastlth.pruning.criteria import CRITERIA, SIGN_TESTS, Inputs
from fastlth.pruning.select import remove_lowest
from fastlth.recipe import PruneSection
from fastlth.training.engines.base import Engine

Gradients = Callable[[], Mapping[str, Tensor]]


def one_shot_masks(
    prune: PruneSection, plan: Plan, initial: Mapping[str, Tensor], final: Mapping[str, Tensor],
    numbers: Mapping[str, int], key: Key, gradients: Gradients,
) -> Iterator[tuple[int, Masks]]:  # fmt: skip
    """(power, masks) for powers 0 to ``plan.powers``; a criterion that is a sign test gives one, as power 1.

    ``numbers`` gives the place of every Linear and Conv weight in the model, ``gradients`` those of the training loss
    at ``initial``. A layer with rate r loses floor((1 - (1 - r)^p) * size) weights, in exact arithmetic; the scope is
    always the layer.
    """
    rates = layer_rates(numbers, prune)
    found = gradients() if plan.criterion in ("snip", "grad") else {}  # on the engine's device
    slopes = {n: slope.to(initial[n].device) for n, slope in found.items()}
    everything = {n: torch.ones(initial[n].shape, dtype=torch.bool) for n in rates}
    scores = {
        n: CRITERIA[plan.criterion](Inputs(
            initial=initial[n], final=final[n], kept=everything[n], gradient=functools.partial(slopes.__getitem__, n),
            alpha=prune.alpha, code=prune.formulas == "code",
        ))
        for n in rates
    }  # fmt: skip
    if plan.criterion in SIGN_TESTS:
        yield 1, scores
        return
    for power in range(plan.powers + 1):
        masks: Masks = {}
        for name, rate in rates.items():
            count = removed(initial[name].numel(), rate, power)
            masks |= remove_lowest(scores, everything, [name], count, numbers=numbers, round=power, key=key)
        yield power, masks


def removed(size: int, rate: Fraction, power: int) -> int:
    """floor((1 - (1 - rate)^power) * size): what ``power`` prunings remove of ``size`` weights, rounded once."""
    return int((1 - (1 - rate) ** power) * size)


def evaluated(
    engine: Engine, theta: Mapping[str, Tensor], multiplier: float, power: int, masks: Masks
) -> dict[str, Any]:
    """Accuracies of the untrained net under ``masks``, and with signed constants: a row of the document."""
    kept = mask_tools.kept(masks)
    whole = sum(theta[n].numel() for n in engine.weight_names)
    unpruned = whole - sum(m.numel() for m in masks.values())
    row: dict[str, Any] = {"power": power, "kept": kept, "density": (kept + unpruned) / whole}
    engine.set_masks(masks)
    constants = {n: signed_constant(theta[n], multiplier) for n in engine.weight_names}
    for which, values in (("init", theta), ("signed_constant", {**theta, **constants})):
        engine.rewind(values)
        row[which] = {f"{split}_accuracy": engine.evaluate(split).accuracy for split in ("validation", "test")}
    return row


def best(rows: list[dict[str, Any]], which: str) -> dict[str, Any]:
    """The power with the best validation accuracy, and the highest test accuracy of all powers, which is what the
    paper reports."""
    chosen = max(rows, key=lambda row: row[which]["validation_accuracy"])
    return {"power": chosen["power"], "density": chosen["density"], **chosen[which],
            "highest_test_accuracy": max(row[which]["test_accuracy"] for row in rows)}  # fmt: skip
