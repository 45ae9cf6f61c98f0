"""How far two tickets agree: masks by overlap, theta0 by bits and by norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlth.analysis import jaccard, kept_by_both
from fastlth.errors import TicketError
from fastlth.models import skeleton, weight_names
from fastlth.store.ticket import Ticket


def diff(a: Ticket, b: Ticket) -> dict[str, Any]:
    """The document of ``ticket diff --json``.

    Rounds that only one of them has count as a difference, and are not compared. A layer that only one of them
    may prune is kept whole by the other. Raises TicketError for nets of different names or shapes.
    """
    _same_architecture(a, b)
    common = min(len(a.rounds), len(b.rounds))
    names = weight_names(skeleton(a.recipe))  # in the order of the net; a file's is alphabetical
    layers = [_layer(name, a, b, common) for name in names if name in a.pruned_at or name in b.pruned_at]
    theta0_identical = all(_same_bits(values, b.rewind[name]) for name, values in a.rewind.items())
    same_masks = all(r["hamming"] == 0 for layer in layers for r in layer["rounds"])
    same_actions = _actions(a) == _actions(b) and all(_same_bits(at, b.fill[n]) for n, at in a.fill.items())
    return {
        "identical": theta0_identical and same_actions and same_masks and len(a.rounds) == len(b.rounds),
        "theta0_identical": theta0_identical,  # biases and batch norm too
        "actions_identical": same_actions,  # what makes a round's start of theta_k and its mask
        "rounds": [len(a.rounds), len(b.rounds)],
        "layers": layers,
    }


def _actions(ticket: Ticket) -> tuple[object, ...]:
    """What, beside theta_k and masks, the starts of a ticket's rounds are made from; ``fill`` by its names."""
    prune = ticket.recipe.prune
    key = None if prune.rewinds else ticket.recipe.seeds.key("prune")
    return prune.mask_1, prune.mask_0, prune.actions, prune.reinit, prune.constant, key, sorted(ticket.fill)


def _layer(name: str, a: Ticket, b: Ticket, rounds: int) -> dict[str, Any]:
    here, there = _pruned_at(name, a), _pruned_at(name, b)
    one, other = a.rewind[name], b.rewind[name]
    same = _same_bits(one, other)
    counts = kept_by_both(here, there, rounds)
    return {
        "name": name,
        "rounds": [{"round": k, **_overlap(*counts[k], here.size)} for k in range(rounds)],
        "theta0_identical": same,
        "theta0_relative_difference": 0.0 if same else _relative_difference(one, other),
    }


def _overlap(a: int, b: int, both: int, size: int) -> dict[str, float]:
    """From counts of kept weights. Hamming: the share of weights that differ."""
    return {"jaccard": jaccard(a, b, both), "hamming": (a + b - 2 * both) / max(size, 1)}


def _relative_difference(a: NDArray[Any], b: NDArray[Any]) -> float | None:
    """norm(a - b) / the larger norm, in [0, 2]; None where a value is not finite, which JSON cannot say."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    scale = max(float(np.linalg.norm(a)), float(np.linalg.norm(b)))
    with np.errstate(invalid="ignore"):  # inf - inf
        distance = float(np.linalg.norm(a - b))
    if not math.isfinite(distance):
        return None
    return distance / scale if scale else 0.0


def _pruned_at(name: str, ticket: Ticket) -> NDArray[np.uint8]:
    at = ticket.pruned_at.get(name)
    return np.zeros(ticket.rewind[name].shape, np.uint8) if at is None else at


def _same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()  # -0.0 is not 0.0, a NaN equals itself


def _same_architecture(a: Ticket, b: Ticket) -> None:
    shapes, others = _shapes(a.rewind), _shapes(b.rewind)
    for name in [*shapes, *others]:
        if shapes.get(name) != others.get(name):
            have, has = (f"has {name} {list(s[name])}" if name in s else f"has no {name}" for s in (shapes, others))
            raise TicketError(f"the first ticket ({a.recipe.model.name}) {have}, the second ({b.recipe.model.name}) "
                              f"{has}; compare two tickets of the same net")  # fmt: skip


def _shapes(arrays: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}
