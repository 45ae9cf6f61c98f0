"""What masks look like: density, signs, overlap, degrees of units, dead units, and whether a layer has collapsed.

A unit is an output of a Linear layer or an output channel of a convolution. Its in-degree counts the kept weights
that come in, the out-degree of an input (pixel, unit or channel) those that read it. In nets that are a chain of
layers a unit is dead if no kept weight comes in or none reads it, and a weight is on a path if it takes part in some
way from the image to the logits that is kept throughout. Biases are not looked at: a unit without inputs still
passes its bias on, but nothing of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fastlth.models import skeleton, weight_names
from fastlth.models.channels import STEP, Link, Removable, decay_keeps_signs, links, removable, work_left
from fastlth.recipe import Recipe
from fastlth.store.ticket import Ticket

Mask = NDArray[np.bool_]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LayerUnits:
    """The units of one layer. The last three are None where the net is not a chain of layers."""

    in_degrees: Counts
    """[outputs]"""
    out_degrees: Counts
    """[inputs]"""
    dead: Mask | None
    """[outputs]: no kept weight comes in, or none of the next layer reads it"""
    on_paths: int | None
    """kept weights that lie on a path from the image to the logits"""
    ends_here: bool | None
    """the paths from the image reach this layer, and none leaves it"""


def units(masks: Mapping[str, Mask], *, chain: bool) -> dict[str, LayerUnits]:
    """The units of all layers. ``masks``: every Linear and Conv layer in model order, [outputs, inputs, ...kernel].

    With ``chain`` each layer reads the one before: input i is unit i, or, behind a flattening, part of unit
    i // (inputs / units).
    """
    counts = {name: _counts(mask) for name, mask in masks.items()}
    degrees = {name: (c.sum(1), c.sum(0)) for name, c in counts.items()}
    if not chain or not counts:
        return {name: LayerUnits(*degrees[name], None, None, None) for name in counts}
    names = list(counts)
    first, last = counts[names[0]], counts[names[-1]]
    logits = np.ones(len(last), bool)  # always read
    read = {name: _per_unit(degrees[behind][1], len(counts[name])) for name, behind in pairwise(names)}
    read[names[-1]] = logits
    entered, reached = {}, np.ones(first.shape[1], bool)  # inputs, units that some path from the image reaches
    for name, c in counts.items():
        entered[name] = np.repeat(reached, c.shape[1] // len(reached))
        reached = c @ entered[name] > 0
    left, needed = {}, logits  # units, inputs from which some path reaches the logits
    for name in reversed(names):
        left[name] = _per_unit(needed, len(counts[name]))
        needed = left[name] @ counts[name] > 0
    return {
        name: LayerUnits(
            *degrees[name],
            dead=(degrees[name][0] == 0) | ~read[name],
            on_paths=int(left[name] @ c @ entered[name]),
            ends_here=bool(entered[name].any() and not (c @ entered[name]).any()),
        )
        for name, c in counts.items()
    }


def collapses(units: Mapping[str, LayerUnits]) -> dict[str, str]:
    """What to say of each layer that has collapsed: it keeps no weight, or the last path to the logits ends in it."""
    said = {name: "keeps no weight" for name, u in units.items() if not u.in_degrees.any()}
    return said | {name: "keeps weights, but every path from the image to the logits ends here"
                   for name, u in units.items() if u.ends_here and name not in said}  # fmt: skip


def sign_agreement(mask: Mask, before: NDArray[Any], trained: NDArray[Any]) -> float | None:
    """Share of the kept weights whose sign after training is the one they had before; None without kept weights.

    Zero has a sign of its own; a NaN agrees with nothing.
    """
    same = ((before > 0) & (trained > 0)) | ((before < 0) & (trained < 0)) | ((before == 0) & (trained == 0))
    kept = int(np.count_nonzero(mask))
    return int(np.count_nonzero(same & mask)) / kept if kept else None


def kept_by_both(a: NDArray[np.uint8], b: NDArray[np.uint8], rounds: int) -> list[tuple[int, int, int]]:
    """(kept by a, by b, by both) in each round from 0, of two ``pruned_at`` of one shape; one pass for all rounds."""
    lived = [np.where(at == 0, 255, at - 1).astype(np.uint16).reshape(-1) for at in (a, b)]  # the last round kept in
    joint = np.bincount(lived[0] << 8 | lived[1], minlength=1 << 16).reshape(256, 256)
    still = joint[::-1, ::-1].cumsum(0).cumsum(1)[::-1, ::-1]  # [i, j]: kept by a in round i and by b in round j
    return [(int(still[k, 0]), int(still[0, k]), int(still[k, k])) for k in range(rounds)]


def jaccard(a: float, b: float, both: float) -> float:
    """Kept by both / kept by either, from the counts; 1 where both are empty."""
    return both / (a + b - both) if a + b else 1.0


def replicate_overlap(tickets: Sequence[Ticket]) -> list[dict[str, Any]]:
    """Per round, how far the masks of several seeds agree: mean Jaccard over all pairs, and per layer.

    ``jaccard_by_chance`` is that of independent masks with the same number kept per layer. Only rounds that all have.
    """
    rounds = min(len(t.rounds) for t in tickets)
    names = [name for name in weight_names(skeleton(tickets[0].recipe)) if name in tickets[0].pruned_at]
    sizes = [tickets[0].pruned_at[name].size for name in names]
    pairs = [[kept_by_both(a.pruned_at[name], b.pruned_at[name], rounds) for name in names]
             for a, b in combinations(tickets, 2)]  # fmt: skip
    found = []
    for k in range(rounds):
        whole, chance = [], []
        for layers in pairs:
            a, b, both = (sum(layer[k][i] for layer in layers) for i in range(3))
            expected = sum(layer[k][0] * layer[k][1] / size for layer, size in zip(layers, sizes, strict=True))
            whole.append(jaccard(a, b, both))
            chance.append(jaccard(a, b, expected))
        each = [fmean(jaccard(*layers[i][k]) for layers in pairs) for i in range(len(names))]
        found.append({
            "round": k, "jaccard": fmean(whole), "jaccard_by_chance": fmean(chance),
            "layers": [{"name": name, "jaccard": j} for name, j in zip(names, each, strict=True)],
        })  # fmt: skip
    return found


def net_units(recipe: Recipe, masks: Mapping[str, Mask]) -> dict[str, LayerUnits]:
    """``units`` of all Linear and Conv layers of the recipe's net; layers without a mask are whole.

    Through pruned weights that a mask-0 action does not keep at zero the image still passes, so there nothing is said
    about paths and dead units.
    """
    net = skeleton(recipe)
    shapes = {name: tuple(net.get_parameter(name).shape) for name in weight_names(net)}
    return units({n: masks.get(n, np.ones(s, bool)) for n, s in shapes.items()}, chain=chain(recipe, net) is not None)


def chain(recipe: Recipe, net: nn.Module) -> list[Link] | None:
    """The layers of the recipe's net where something can be said of paths through them, else None."""
    return None if recipe.model.own or recipe.prune.mask_0 != "mask" else links(net)


def layer_records(
    recipe: Recipe, round: int, masks: Mapping[str, Mask], previous: Mapping[str, Mask] | None,
    before: Mapping[str, NDArray[Any]], trained: Mapping[str, NDArray[Any]],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One flat record per layer of a finished round, one for each layer that has collapsed, and one of the work
    that would be left without units that the net does not need (docs/metrics.md).

    ``masks`` are the round's, ``previous`` those of the round before, if any; ``before`` are the parameters and buffers
    the round began with, ``trained`` those it ended with.
    """
    found, without = net_units(recipe, masks), removable_units(recipe, masks, before)
    for name, u in found.items():
        none = without[name.removesuffix(".weight")] if without else None
        whole = np.ones(trained[name].shape, bool)
        mask = masks.get(name, whole)
        kept = int(np.count_nonzero(mask))
        yield {
            "event": "layer", "round": round, "layer": name,
            "weights": mask.size, "kept": kept, "density": kept / mask.size,
            "sign_agreement": sign_agreement(mask, before[name], trained[name]),
            **_overlap(mask, None if previous is None else previous.get(name, whole)),
            **unit_fields(u),
            "unread_units": int(none.unread.sum()) if none else None,
            "silent_units": int(none.silent.sum()) if none else None,
        }  # fmt: skip
    for name, what in collapses(found).items():
        yield {"event": "warning", "round": round, "layer": name, "message": f"{name} {what}"}
    if without is not None:
        yield {"event": "work", "round": round, **_work(recipe, without)}


def removable_units(
    recipe: Recipe, masks: Mapping[str, Mask], start: Mapping[str, NDArray[Any]]
) -> dict[str, Removable] | None:  # fmt: skip
    """By layer name, the units that a round beginning with ``start`` could do without; None where nothing is said
    about paths (``net_units``)."""
    net = skeleton(recipe)
    layers = chain(recipe, net)
    if not layers:
        return None
    whole = {n: masks.get(n, np.ones(tuple(net.get_parameter(n).shape), bool)) for n in weight_names(net)}
    return removable(layers, whole, start, signs_stay=decay_keeps_signs(recipe.train))


def _work(recipe: Recipe, found: Mapping[str, Removable]) -> dict[str, float]:
    gone = {name: units.either for name, units in found.items()}
    shape = recipe.data.facts.shape
    return {"work_left": work_left(skeleton(recipe), shape, gone),
            f"work_left_by_{STEP}": work_left(skeleton(recipe), shape, gone, STEP)}  # fmt: skip


def _overlap(mask: Mask, previous: Mask | None) -> dict[str, float | None]:
    if previous is None:
        return {"jaccard_with_previous": None, "kept_of_previous": None}
    kept, was, both = (int(np.count_nonzero(m)) for m in (mask, previous, mask & previous))
    return {"jaccard_with_previous": jaccard(kept, was, both), "kept_of_previous": both / was if was else 1.0}


def unit_fields(units: LayerUnits) -> dict[str, Any]:
    """The fields of a layer's record that are about its units."""
    return {
        "units": len(units.in_degrees),
        "dead_units": None if units.dead is None else int(units.dead.sum()),
        "unread_inputs": int((units.out_degrees == 0).sum()),
        "kept_on_paths": units.on_paths,
        **_summary("in_degree", units.in_degrees),
        **_summary("out_degree", units.out_degrees),
    }


def _counts(mask: Mask) -> Counts:
    """Kept weights from each input to each unit, [outputs, inputs]."""
    if mask.ndim == 2:
        return mask.astype(np.int64)
    counts: Counts = np.count_nonzero(mask.reshape(*mask.shape[:2], -1), axis=2)
    return counts


def _per_unit(inputs: NDArray[Any], units: int) -> Mask:
    """Whether any of the inputs that are one unit of the layer before is not zero: [units]."""
    some: Mask = (inputs.reshape(units, -1) != 0).any(axis=1)
    return some


def _summary(name: str, degrees: Counts) -> dict[str, Any]:
    return {f"{name}_min": int(degrees.min()), f"{name}_median": float(np.median(degrees)),
            f"{name}_max": int(degrees.max())}  # fmt: skip
