"""Ticket files without training: random masks, theta0 of the recipe's seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastlth.models import skeleton, weight_names
from fastlth.recipe import Recipe
from fastlth.store.ticket import Ticket, save
from fastlth.tickets import theta0
from tests.helpers import small_recipe

LENET = {"model": "lenet-300-100"}
CONV = {"model": "conv-2", "model__batch_norm": True}


def make_ticket(path: Path, recipe: Recipe | None = None, rounds: int = 4, seed: int = 1, winner: int = 2) -> Ticket:
    """A ticket of ``rounds`` finished rounds, each removing a fifth of every layer, and of the next one's mask;
    round ``winner`` is the winning ticket."""
    recipe = recipe or small_recipe()
    net = skeleton(recipe)
    names, state = weight_names(net), net.state_dict()
    pruned_at = {n: np.zeros(state[n].shape, np.uint8) for n in names}
    rng, results = np.random.default_rng(seed), []
    total = sum(at.size for at in pruned_at.values())
    for k in range(rounds + 1):
        for at in pruned_at.values():
            alive = rng.permutation(np.flatnonzero(at == 0))
            at.reshape(-1)[alive[: len(alive) // 5 if k else 0]] = k
        kept = sum(int((at == 0).sum()) for at in pruned_at.values())
        results.append(_result(k, kept, total, 0.9 if k <= winner else 0.8))
    rewind = theta0(recipe)
    for name in [n for n in rewind if "running" in n or n.endswith("tracked")]:  # buffers as after some training
        rewind[name] = (rewind[name] + rng.integers(1, 5, rewind[name].shape)).astype(rewind[name].dtype)
    ticket = Ticket(recipe=recipe, resolved={}, rewind=rewind, rewind_iteration=0, pruned_at=pruned_at,
                    all_weights=total, rounds=tuple(results[:rounds]))  # fmt: skip
    save(path, ticket)
    return ticket


def _result(k: int, kept: int, total: int, accuracy: float) -> dict[str, Any]:
    return {
        "round": k, "density": kept / total, "kept": kept, "early_stop_iteration": 20,
        "early_stop_validation_loss": 0.4, "early_stop_validation_accuracy": accuracy,
        "early_stop_test_accuracy": accuracy, "test_accuracy": accuracy, "train_accuracy": 1.0, "engine": "dense",
        "seconds": 0.5, "images_per_second": 1000.0,
    }  # fmt: skip
